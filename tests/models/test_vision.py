"""The vision towers against golden runs, against transformers with every gradient, and their own properties."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from npedit_jax import weights
from npedit_jax.models.vision import VisionTransformer, resize_positions
from npedit_jax.weights import internvl, llava_onevision
from npedit_jax.weights.table import Row
from npedit_jax.weights.vision import layer_rows
from tests.models.torch_parity import FORWARD, assert_gradients, count, fill, randomise, relative, to_flax

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "D"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(GOLDEN / "golden.safetensors")


def run(module: VisionTransformer, params, pixels_BCHW):
    return jax.jit(module.apply)({"params": params}, np.transpose(pixels_BCHW, (0, 2, 3, 1)))


def compare(ours: VisionTransformer, theirs: torch.nn.Module, table: list[Row], pixels: np.ndarray) -> None:
    """Compares the last layer's output, and the gradients of every parameter and of the pixels."""
    table = [Row(**vars(row) | {"target": row.target.removeprefix("vision/")}) for row in table]
    names = {row_name for row in table for row_name in row.names()}
    prefix = "vision_tower."
    inputs = torch.tensor(pixels, requires_grad=True)
    hidden = theirs(inputs, output_hidden_states=True).hidden_states[-1]
    probe = np.random.default_rng(5).normal(size=hidden.shape).astype(np.float32)
    (hidden * torch.tensor(probe)).sum().backward()
    used = {prefix + name: x for name, x in theirs.named_parameters() if prefix + name in names}
    params = to_flax(table, {name: x.detach().numpy() for name, x in used.items()})
    expected = to_flax(table, {name: x.grad.numpy() for name, x in used.items() if x.grad is not None})

    def loss(p, x):
        found = run(ours, p, x)
        return jnp.sum(found * probe), found

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, pixels)
    assert relative(found, hidden.detach().numpy()) <= FORWARD
    assert_gradients(gradients[0], expected)
    assert relative(gradients[1], inputs.grad.numpy()) <= 1e-4


@pytest.mark.parametrize(
    ("change", "height", "width"),
    [
        ({}, 28, 28),
        ({}, 35, 49),  # another size and shape than the position table's
        ({"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}, 28, 28),  # as in InternViT-6B
    ],
)
def test_internvit_is_that_of_transformers(change, height, width):
    config = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": [28, 28],
        "patch_size": [7, 7],
        "attention_bias": True,
    } | change
    theirs = transformers.InternVLVisionModel(transformers.InternVLVisionConfig(**config))
    ours = internvl.build_vision(config, "native", {})
    pixels = np.random.default_rng(0).normal(size=(2, 3, height, width)).astype(np.float32)
    compare(ours, randomise(theirs), internvl.vision_rows(ours, "native"), pixels)


def test_siglip_is_that_of_transformers():
    config = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 36,
        "image_size": 23,  # not a multiple of the patch, as SigLIP's 384 is not
        "patch_size": 5,
        "vision_use_head": False,
    }
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))
    ours = llava_onevision.build_vision(config)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 23, 23)).astype(np.float32)
    compare(ours, randomise(theirs), llava_onevision.vision_rows(ours), pixels)


def test_internvit_is_the_original(golden):
    module, params = weights.load("internvl", GOLDEN / "internvl_chat")
    pixels = np.repeat(np.repeat(golden["ivl.px_lo"], 8, axis=2), 8, axis=3)
    assert relative(run(module.vision, params["vision"], pixels), golden["ivl.vit_hidden"]) <= FORWARD


def test_siglip_is_the_original(golden):
    module, params = weights.load("llava_onevision", GOLDEN / "llava_onevision", keep_unused=True)
    hidden = run(module.vision, params["vision"], golden["llava.px"][:, 0])
    assert relative(hidden, golden["llava.siglip_pre_ln"]) <= FORWARD
    norm = nn.LayerNorm(module.vision.epsilon, use_fast_variance=False)  # which the scorer does not use
    last = norm.apply({"params": params["unused"]["vision_norm"]}, hidden)
    assert relative(last, golden["llava.siglip_last"]) <= FORWARD


@pytest.mark.parametrize(("height", "width"), [(7, 7), (10, 5), (3, 12), (14, 14)])
def test_positions_are_interpolated_as_in_pytorch(height, width):
    table = np.random.default_rng(0).normal(size=(49, 4)).astype(np.float32)
    grid = torch.tensor(table.reshape(1, 7, 7, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    found = resize_positions(jnp.asarray(table), height, width)
    assert relative(found, expected[0].permute(1, 2, 0).reshape(-1, 4).numpy()) <= FORWARD


def test_stem_is_convolutions_before_smaller_patches():
    module = VisionTransformer(width=16, layers=1, heads=2, mlp_width=32, patch_size=8, image_size=32, stem=(6, 10))
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    params = fill(jax.eval_shape(module.init, jax.random.key(0), np.transpose(pixels, (0, 2, 3, 1))))["params"]
    assert params["patch_embedding"]["kernel"].shape == (2, 2, 10, 16)
    x = torch.tensor(pixels)
    for name in ("stem_0", "stem_1"):
        kernel = torch.tensor(np.array(params[name]["kernel"])).permute(3, 2, 0, 1)
        bias = torch.tensor(np.array(params[name]["bias"]))
        x = torch.nn.functional.gelu(torch.nn.functional.conv2d(x, kernel, bias, stride=2, padding=1))
    bare = module.clone(stem=(), patch_size=2, image_size=8)
    rest = {name: value for name, value in params.items() if not name.startswith("stem")}
    assert relative(run(module, params, pixels), run(bare, rest, x.numpy())) <= FORWARD


def test_every_pixel_has_a_gradient():
    module = VisionTransformer(width=16, layers=2, heads=2, mlp_width=32, patch_size=8, image_size=32, stem=(6, 10))
    pixels = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    params = fill(jax.eval_shape(module.init, jax.random.key(0), pixels))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(module.apply(params, x)[:, 0]))))(pixels)
    assert jnp.all(jnp.any(gradient != 0, axis=-1))


def test_full_size_counts():
    internvit = VisionTransformer(width=1024, layers=24, heads=16, mlp_width=4096)
    shapes = jax.eval_shape(internvit.init, jax.random.key(0), jnp.zeros((1, 448, 448, 3)))["params"]
    assert count(shapes) == 304_012_288
    siglip = VisionTransformer(width=1152, layers=26, heads=16, mlp_width=4304, image_size=384, activation="gelu_tanh",
                               class_token=False, layer_scale=None)  # fmt: skip
    shapes = jax.eval_shape(siglip.init, jax.random.key(0), jnp.zeros((1, 384, 384, 3)))["params"]
    assert shapes["positions"].shape == (729, 1152)


@pytest.mark.parametrize(
    ("change", "side", "message"),
    [
        ({"norm": "batch"}, 16, "batch"),
        ({"activation": "relu"}, 16, "relu"),
        ({"heads": 3}, 16, "heads=3"),
        ({"stem": (4, 4, 4)}, 16, "multiple of 8"),
        ({}, 3, "3x3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, side, message):
    fields = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "patch_size": 4, "image_size": 16}
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**fields | change).init(jax.random.key(0), jnp.zeros((1, side, side, 3)))


def test_rows_of_a_fused_projection_share_a_tensor():
    module = VisionTransformer(width=8, layers=2, heads=2, mlp_width=16)
    rows = layer_rows(module, "layers.{i}", "layers", internvl.LAYER_NAMES["chat"])
    parts = {row.target: (row.source, row.part, row.parts) for row in rows if "qkv" in row.source}
    assert parts["layers/attention/key/kernel"] == ("layers.{i}.attn.qkv.weight", 1, 3)
    assert parts["layers/attention/value/bias"] == ("layers.{i}.attn.qkv.bias", 2, 3)
