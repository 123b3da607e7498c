"""The autoencoder against the original's stored results and against diffusers on random small configurations."""

import functools
import json
import pathlib

import diffusers
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from npedit_jax import weights
from npedit_jax.models.autoencoder import Autoencoder, GroupNorm
from npedit_jax.weights import autoencoder as autoencoder_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "B"

# Each differs from the others in depth, widths (narrowing ones too), attention, quant convs and image shape.
CONFIGS = {
    "one block": ({"block_out_channels": [8], "layers_per_block": 2, "latent_channels": 3}, (2, 6, 10)),
    "two blocks, quant convs": (
        {"block_out_channels": [8, 12], "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None},
        (1, 12, 8),
    ),
    "three blocks, no attention, sides that no block halves evenly": (
        {"block_out_channels": [12, 4, 8], "mid_block_add_attention": False},
        (3, 11, 14),
    ),
}
BASE_CONFIG = {
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


def small_module(**options) -> Autoencoder:
    return Autoencoder((8, 16), 1, 4, groups=4, **options)


def random_params(module: Autoencoder) -> dict:
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


def relative(found, expected) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x[:, :, 0] if x.ndim == 5 else x, 1, -1)


@pytest.fixture(scope="module")
def golden():
    tensors = safetensors.numpy.load_file(GOLDEN / "golden.safetensors")
    return {name: channels_last(x) for name, x in tensors.items()}


@pytest.fixture(scope="module")
def golden_model():
    return weights.load("autoencoder", GOLDEN / "vae")


def test_golden_encode(golden, golden_model):
    module, params = golden_model

    @jax.jit
    def encode(images):
        methods = ("encode_moments", "encode")
        return tuple(module.apply({"params": params}, images, method=method) for method in methods)

    (mean, _), latents = encode(golden["x"])
    assert relative(mean, golden["mean"]) < 2e-5
    assert relative(latents, golden["z"]) < 2e-5


def test_golden_decode_its_gradient_and_roundtrip(golden, golden_model):
    module, params = golden_model

    @jax.jit
    def decode(z, probe):
        decoded, pullback = jax.vjp(lambda z: module.apply({"params": params}, z, method="decode"), z)
        return decoded, pullback(probe)[0]

    decoded, gradient = decode(golden["z_in"], golden["probe"])
    assert relative(decoded, golden["dec"]) < 2e-5
    assert relative(gradient, golden["dz"]) < 1e-4
    assert relative(decode(golden["z"], golden["probe"])[0], golden["roundtrip"]) < 2e-5


def random_original(overrides: dict, seed: int) -> diffusers.AutoencoderKL:
    config = BASE_CONFIG | overrides
    blocks = len(config["block_out_channels"])
    torch.manual_seed(seed)
    original = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks, **config
    )
    with torch.no_grad():  # norms start at scale 1 and bias 0, which would hide a swap
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return original


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers_in_values_and_every_gradient(name, tmp_path):
    overrides, (batch, height, width) = CONFIGS[name]
    original = random_original(overrides, seed=len(name))
    original.save_pretrained(tmp_path)
    module, params = weights.load("autoencoder", tmp_path)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)

    x = torch.from_numpy(images).permute(0, 3, 1, 2).requires_grad_()
    moments = original.encode(x).latent_dist
    shift = original.config.shift_factor or 0.0
    z = (moments.mean - shift) * original.config.scaling_factor
    decoded = original.decode(z / original.config.scaling_factor + shift).sample
    probes = [torch.from_numpy(rng.standard_normal(y.shape).astype(np.float32)) for y in (decoded, moments.logvar)]
    (decoded * probes[0]).sum().add((moments.logvar * probes[1]).sum()).backward()
    probe_decoded, probe_logvar = (channels_last(p.numpy()) for p in probes)

    def run(params, images):
        mean, logvar = module.apply({"params": params}, images, method="encode_moments")
        latents = (mean - module.shift_factor) * module.scaling_factor
        decoded = module.apply({"params": params}, latents, method="decode")
        return jnp.sum(decoded * probe_decoded) + jnp.sum(logvar * probe_logvar), (mean, logvar, latents, decoded)

    (_, found), (gradients, of_images) = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(params, images)
    assert relative(of_images, channels_last(x.grad.numpy())) < 1e-4
    for ours, theirs in zip(found, (moments.mean, moments.logvar, z, decoded), strict=True):
        assert relative(ours, channels_last(theirs.detach().numpy())) < 2e-5

    flat = flax.traverse_util.flatten_dict(gradients, sep="/")
    theirs = dict(original.named_parameters())
    # The attention's key bias has no gradient at all: errors are held against the whole gradient, too.
    floor = 1e-6 * np.sqrt(sum(float(p.grad.square().sum()) for p in theirs.values()))
    rows = autoencoder_weights.rows(module)
    assert {row.source for row in rows} == set(theirs)
    for row in rows:
        expected = theirs[row.source].grad.numpy()
        error = np.linalg.norm(row.to_source(np.asarray(flat[row.target])) - expected)
        assert error < max(1e-4 * np.linalg.norm(expected), floor), row.source


def test_config_round_trip_keeps_what_diffusers_reads(tmp_path):
    original = random_original(CONFIGS["two blocks, quant convs"][0], seed=0)
    original.save_pretrained(tmp_path)
    module = autoencoder_weights.build(json.loads((tmp_path / "config.json").read_text()))
    config = autoencoder_weights.describe(module)
    assert autoencoder_weights.build(config) == module
    again = diffusers.AutoencoderKL.from_config(config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}


@pytest.mark.parametrize(
    "setting",
    [
        {"act_fn": "relu"},
        {"latents_mean": [0.0]},
        {"up_block_types": ["AttnUpDecoderBlock2D"]},
        {"in_channels": 4},
    ],
)
def test_unsupported_config_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        autoencoder_weights.build({"block_out_channels": [32]} | setting)


def test_full_size_parameter_count():
    shapes = jax.eval_shape(Autoencoder().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_819_683


@pytest.fixture(scope="module")
def decode_small():
    """Pixels and gradients of a small module as a function of its options; compiled once for each."""
    small = Autoencoder((4,), 1, 4, groups=2, middle_attention=False)
    params = random_params(small)
    latents = jax.random.normal(jax.random.key(1), (5, 4, 3, 4))

    @functools.cache
    def run(**options):
        module = small.clone(**options)

        def loss(params, latents):
            pixels = module.apply({"params": params}, latents, method="decode")
            return jnp.sum(jnp.sin(pixels)), pixels

        (_, pixels), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, latents)
        return pixels, gradients

    return run


@pytest.mark.parametrize("options", [{"slice_batch": 2}, {"slice_batch": 1, "remat": "full"}])
def test_slices_and_remat_change_neither_values_nor_gradients(options, decode_small):
    for expected, found in zip(jax.tree.leaves(decode_small()), jax.tree.leaves(decode_small(**options)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()) + 1e-3)


def test_slices_larger_than_the_batch_take_it_whole():
    module, images = small_module(slice_batch=7), jax.ShapeDtypeStruct((7, 4, 4, 3), jnp.float32)
    params = random_params(module)
    assert "scan" not in str(jax.make_jaxpr(lambda x: module.apply({"params": params}, x))(images))


def test_slices_lower_the_memory():
    params = random_params(small_module())

    def temporary_bytes(slice_batch: int) -> int:
        module = small_module(slice_batch=slice_batch)
        images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
        compiled = jax.jit(lambda x: module.apply({"params": params}, x, method="encode")).lower(images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1) < temporary_bytes(0) / 3


def test_remat_keeps_less_for_the_backward_pass():
    params = random_params(small_module())

    def kept_bytes(policy: str) -> int:
        module = small_module(remat=policy)

        def pullback(z):
            return jax.vjp(lambda z: module.apply({"params": params}, z, method="decode"), z)[1]

        residuals = jax.eval_shape(pullback, jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.float32))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    kept = {policy: kept_bytes(policy) for policy in ("none", "full", "dots", "dots_no_batch")}
    assert kept["full"] < kept["none"] / 4
    # Attention scores are products with batch dimensions; the projections around them are not.
    assert kept["full"] < kept["dots_no_batch"] < kept["dots"] < kept["none"]


def test_unknown_remat_policy_is_named():
    with pytest.raises(ValueError, match="'everything'"):
        small_module(remat="everything").init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_group_norm_is_exact_far_from_zero():
    """Variance by two passes: with mean 1000 and deviation 1, E[x^2] - E[x]^2 would lose every digit in float32."""
    rng = np.random.default_rng(0)
    x = (1000.0 + rng.standard_normal((2, 5, 7, 12))).astype(np.float32)
    norm = GroupNorm(groups=3)
    params = {"scale": rng.standard_normal(12).astype(np.float32), "bias": rng.standard_normal(12).astype(np.float32)}
    expected = torch.nn.functional.group_norm(
        torch.from_numpy(x).double().permute(0, 3, 1, 2),
        3,
        *(torch.from_numpy(p).double() for p in params.values()),
        1e-6,
    )
    assert relative(norm.apply({"params": params}, x), channels_last(expected.numpy())) < 1e-4


def test_group_norm_names_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="5 norm groups do not divide 12"):
        GroupNorm(groups=5).init(jax.random.key(0), jnp.zeros((1, 2, 2, 12)))


def test_low_precision_compute_keeps_float32_outside():
    module = Autoencoder((8,), 1, 4, groups=4, middle_attention=False, dtype=jnp.bfloat16)
    params = random_params(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    images = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3), minval=-1.0)
    decoded, expected = (
        jax.jit(lambda x, m=m: m.apply({"params": params}, x))(images)
        for m in (module, module.clone(dtype=jnp.float32))
    )
    assert decoded.dtype == jnp.float32
    assert 0 < relative(decoded, np.asarray(expected)) < 0.05
