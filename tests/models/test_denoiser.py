"""The denoiser against golden runs of the original, against diffusers' class, and its own properties."""

import functools
import pathlib

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from npedit_jax import weights
from npedit_jax.models import denoiser, layers, positions
from npedit_jax.models.denoiser import MLP, Denoiser, TimeEmbedding
from npedit_jax.pytorch import edit
from npedit_jax.weights import zimage
from tests.models import torch_parity

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "A"
CASES = ("a", "b", "c")
SMALL = {
    "channels": 4,
    "width": 48,
    "depth": 2,
    "refiner_depth": 1,
    "heads": 2,
    "text_width": 20,
    "rope_widths": (8, 8, 8),
    "rope_lengths": (128, 16, 16),
}


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def loaded():
    return weights.load("zimage", GOLDEN / "transformer")


def channels_last(x_BCFHW: np.ndarray) -> np.ndarray:
    return x_BCFHW[:, :, 0].transpose(0, 2, 3, 1)


def relative(actual, expected) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def inputs(golden, case: str) -> tuple[np.ndarray, ...]:
    """Latents, times, caption features and their mask."""
    text_BLD, length_B = golden[f"{case}.txt"], golden[f"{case}.cap_lens"]
    mask_BL = np.arange(text_BLD.shape[1])[None] < length_B[:, None]
    return channels_last(golden[f"{case}.x"]), golden[f"{case}.t"], text_BLD, mask_BL


def longest(golden, case: str) -> np.ndarray:
    """Rows with the longest padded caption: in the release's reference path the others depend on these."""
    padded_B = -(-golden[f"{case}.cap_lens"] // 32)
    return padded_B == padded_B.max()


# Here compiling costs far more than running.
quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
)


@functools.partial(quick, static_argnums=0)
def run(module, params, *arguments):
    return apply(module, params, *arguments)


def apply(module, params, *arguments):
    return module.apply({"params": params}, *arguments)


def randomized(module: Denoiser, *arguments, seed: int = 0):
    """Parameters with every tensor random: at initialisation the output is zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 0.3 if len(leaf.shape) < 2 else 0.7 * leaf.shape[-2] ** -0.5
        return jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype)

    return jax.tree.map(draw, shapes)


def small_inputs(batch: int = 2, text: int = 40, seed: int = 1) -> tuple[np.ndarray, ...]:
    """Latents of 6 x 10, times, captions of 3, 40, 33, ... tokens and their mask."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(batch, 6, 10, 4)).astype(np.float32)
    times = np.linspace(0.2, 0.9, batch).astype(np.float32)
    features = rng.normal(size=(batch, text, 20)).astype(np.float32)
    length = np.resize(np.array([3, 40, 33]), batch)
    return latents, times, features, np.arange(text)[None] < length[:, None]


# Golden runs


@pytest.mark.parametrize("case", CASES)
def test_plain_path_is_the_original(golden, loaded, case):
    module, params = loaded
    velocity = run(module, params, *inputs(golden, case))
    assert velocity.dtype == jnp.float32
    assert relative(velocity, channels_last(golden[f"{case}.v_plain"])) <= 2e-5
    assert relative(-velocity, channels_last(golden[f"{case}.raw_plain"])) <= 2e-5
    rows = longest(golden, case)
    assert relative(velocity[rows], channels_last(golden[f"{case}.v_plain_fa4"])[rows]) <= 2e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("pad_tokens", "name"), [("mask", "v_ref"), ("attend", "v_ref_fa4")])
def test_reference_path_is_the_original(golden, loaded, case, pad_tokens, name):
    module, params = loaded
    module, reference = module.clone(pad_tokens=pad_tokens), channels_last(golden[f"{case}.ref"])
    velocity = run(module, params, *inputs(golden, case), reference)
    rows = longest(golden, case)
    assert relative(velocity[rows], channels_last(golden[f"{case}.{name}"])[rows]) <= 2e-5


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("path", ["plain", "ref"])
def test_gradients_of_the_inputs_are_the_original(golden, loaded, case, path):
    module, params = loaded
    x, t, text, mask = inputs(golden, case)
    arguments = (x, text) if path == "plain" else (x, text, channels_last(golden[f"{case}.ref"]))
    probe = channels_last(golden[f"{case}.probe_{path}"])
    module = module.clone(pad_tokens="mask")  # in the plain path it must not matter

    def scalar(x, text, *reference):
        return jnp.sum(apply(module, params, x, t, text, mask, *reference) * probe)

    gradients = quick(jax.grad(scalar, argnums=range(len(arguments))))(*arguments)
    expected = [channels_last(golden[f"{case}.dx_{path}"]), golden[f"{case}.dtxt_{path}"]]
    expected += [channels_last(golden[f"{case}.dref_ref"])] if path == "ref" else []
    whole = np.sqrt(sum(np.sum(g**2) for g in expected))
    rows = longest(golden, case) if path == "ref" else slice(None)
    for actual, wanted in zip(gradients, expected, strict=True):
        error = np.linalg.norm(np.asarray(actual)[rows] - wanted[rows])
        assert error <= 1e-4 * np.linalg.norm(wanted[rows]) + 1e-6 * whole


@pytest.mark.parametrize("item", [0, 1])
def test_batch_of_mixed_sizes_one_by_one(golden, loaded, item):
    module, params = loaded
    text_BLD = golden[f"mix.cap{item}"][None]
    latents = channels_last(golden[f"mix.x{item}"][None])
    velocity = run(
        module, params, latents, golden["mix.t"][item : item + 1], text_BLD, np.ones(text_BLD.shape[:2], bool)
    )
    assert relative(-velocity, channels_last(golden[f"mix.raw{item}"][None])) <= 2e-5


def test_rotation_tables_are_the_original(golden, loaded):
    module, _ = loaded
    ids_BSR = golden["prim.rope_ids"][None]
    cosine, sine = positions.rotation(ids_BSR, module.rope_widths, module.rope_lengths, module.rope_theta)
    np.testing.assert_allclose(cosine[0, :, 0, ::2], golden["prim.rope_cos"], atol=1e-6)
    np.testing.assert_allclose(sine[0, :, 0, 1::2], golden["prim.rope_sin"], atol=1e-6)


def test_rotate_turns_pairs_as_complex_numbers(golden, loaded):
    module, _ = loaded
    ids_BSR = golden["prim.rope_ids"][None]
    turn = positions.rotation(ids_BSR, module.rope_widths, module.rope_lengths, module.rope_theta)
    x = np.random.default_rng(0).normal(size=(1, 4, 3, 16)).astype(np.float32)
    phase = (golden["prim.rope_cos"] + 1j * golden["prim.rope_sin"])[None, :, None]
    expected = (x[..., ::2] + 1j * x[..., 1::2]) * phase
    actual = np.asarray(positions.rotate(x, turn))
    np.testing.assert_allclose(actual[..., ::2] + 1j * actual[..., 1::2], expected, atol=1e-5)


def test_long_sequences_go_through_the_mlp_some_tokens_at_a_time(monkeypatch):
    """50 tokens in four parts of 13, the last two padding: the same parameters, values and gradients."""
    mlp = MLP(jnp.float32, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50, 24)), jnp.float32)

    def everything():
        params = mlp.init(jax.random.key(0), x)
        loss = lambda params, x: jnp.sum(jnp.sin(mlp.apply(params, x)))  # noqa: E731
        return params, mlp.apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x)

    expected = everything()
    assert "while" not in jax.jit(mlp.apply).lower(expected[0], x).as_text()
    monkeypatch.setattr(layers, "LONG", 50)
    monkeypatch.setattr(denoiser, "CHUNK", 16)
    found = everything()
    assert "while" in jax.jit(lambda *x: mlp.apply(*x)).lower(expected[0], x).as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_time_embedding_is_the_original(golden, loaded):
    module, params = loaded
    embed, sinusoids = TimeEmbedding(64, module.time_scale, jnp.float32), []

    def note(call, arguments, keywords, context):
        if context.module.name == "hidden":
            sinusoids.append(arguments[0])
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        actual = embed.apply({"params": params["time_embedding"]}, golden["prim.tz"])
    assert relative(actual, golden["prim.temb"]) <= 2e-5
    assert relative(sinusoids[0], golden["prim.tfreq"]) <= 2e-5


def test_bfloat16_stays_close(golden, loaded):
    module, params = loaded
    module = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    velocity = run(module, params, *inputs(golden, "c"))
    assert velocity.dtype == jnp.float32
    assert relative(velocity, channels_last(golden["c.v_plain"])) <= 2e-2


# PyTorch


def gradients_of(theirs: torch.nn.Module, module: Denoiser) -> dict:
    """Those of all parameters, in our layout; a pad token that nobody sees has none."""
    zeros = lambda x: torch.zeros_like(x) if x.grad is None else x.grad  # noqa: E731
    return torch_parity.to_flax(zimage.rows(module), {n: zeros(x).numpy() for n, x in theirs.named_parameters()})


def test_plain_path_and_gradients_of_all_parameters_are_diffusers(tmp_path):
    latents, times, text, mask = small_inputs()
    module = Denoiser(**(SMALL | {"depth": 3, "refiner_depth": 2}))
    params = randomized(module, latents, times, text, mask)
    weights.save("zimage", module, params, tmp_path / "flax")
    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path / "flax").float()

    probe = np.random.default_rng(5).normal(size=latents.shape).astype(np.float32)
    images = list(torch.tensor(latents.transpose(0, 3, 1, 2))[:, :, None])
    captions = [torch.tensor(row[row_mask]) for row, row_mask in zip(text, mask, strict=True)]
    output = theirs(images, torch.tensor(1.0 - times), captions, return_dict=False)[0]
    expected = -np.stack([x[:, 0].permute(1, 2, 0).detach().numpy() for x in output])
    assert relative(run(module, params, latents, times, text, mask), expected) <= 2e-5

    with torch.no_grad():
        cotangents = [-torch.tensor(row.transpose(2, 0, 1))[:, None] for row in probe]
    torch.autograd.backward(output, cotangents)

    def scalar(params):
        return jnp.sum(apply(module.clone(remat="full"), params, latents, times, text, mask) * probe)

    torch_parity.assert_gradients(quick(jax.grad(scalar))(params), gradients_of(theirs, module))


@pytest.mark.parametrize(
    ("pad_tokens", "pad_multiple", "tokens"),
    [("attend", 8, 12), ("mask", 8, 12), ("mask", 32, 40)],  # captions of 3 and 9, or 3 and 40 tokens
)
def test_gradients_of_the_reference_path_are_those_of_pytorch(tmp_path, pad_tokens, pad_multiple, tokens):
    """In every input and every parameter; the function in PyTorch is itself proved against the release's edits."""
    latents, times, text, mask = small_inputs(text=tokens)
    if tokens == 12:
        mask[:, 9:] = False
    else:
        latents = np.concatenate([latents, latents[:, ::-1]], axis=1)  # 12 x 10: another shape
    reference, probe = np.random.default_rng(3).normal(size=(2, *latents.shape)).astype(np.float32)
    module = Denoiser(**SMALL, pad_multiple=pad_multiple, pad_tokens=pad_tokens)
    params = randomized(module, latents, times, text, mask)
    weights.save("zimage", module, params, tmp_path)
    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path).float()

    options = edit.Options(pad_multiple=pad_multiple, pad_tokens=pad_tokens)
    tensors = [torch.tensor(x, requires_grad=True) for x in (latents, text, reference)]
    for row, (noisy, caption, clean) in enumerate(zip(*tensors, strict=True)):
        arguments = (float(times[row]), caption[: mask[row].sum()], clean.permute(2, 0, 1))
        velocity = edit.predict_velocity(theirs, options, noisy.permute(2, 0, 1), *arguments)
        velocity.backward(torch.tensor(probe[row]).permute(2, 0, 1))
    expected = {name: x.grad.numpy() for name, x in zip(("latents", "text", "reference"), tensors, strict=True)}

    def scalar(params, inputs):
        found = apply(module, params, inputs["latents"], times, inputs["text"], mask, inputs["reference"])
        return jnp.sum(found * probe)

    inputs = {"latents": latents, "text": text, "reference": reference}
    of_params, of_inputs = quick(jax.grad(scalar, argnums=(0, 1)))(params, inputs)
    torch_parity.assert_gradients(of_params | of_inputs, gradients_of(theirs, module) | expected)


# Properties


@pytest.mark.parametrize(
    ("options", "edit"),
    [({}, False), ({"pad_tokens": "mask"}, True), ({"pad_multiple": 8}, True)],
)
def test_a_sample_does_not_depend_on_its_neighbours_or_on_padding(options, edit):
    module = Denoiser(**SMALL, **options)
    latents, times, text, mask = small_inputs(batch=3)
    reference = (np.flip(latents, 1).copy(),) if edit else ()
    params = randomized(module, latents, times, text, mask, *reference)
    together = run(module, params, latents, times, text, mask, *reference)

    polluted = np.where(mask[..., None], text, np.nan).astype(np.float32)
    np.testing.assert_array_equal(run(module, params, latents, times, polluted, mask, *reference), together)
    alone = [a[:1] for a in (latents, times, text[:, :3], mask[:, :3], *reference)]
    assert relative(run(module, params, *alone), together[:1]) <= 1e-5


def test_padding_has_no_gradient_even_when_it_is_nan():
    module = Denoiser(**(SMALL | {"refiner_depth": 0}))
    latents, times, text, mask = small_inputs()
    params = randomized(module, latents, times, text, mask)
    polluted = np.where(mask[..., None], text, np.nan)
    gradient = quick(jax.grad(lambda x: jnp.sum(apply(module, params, latents, times, x, mask) ** 2)))(polluted)
    assert np.all(np.asarray(gradient)[~mask] == 0)
    assert np.all(np.abs(np.asarray(gradient)[mask]).sum(-1) > 0)


def test_sample_prediction_is_a_clamped_velocity_of_the_raw_output():
    latents, _, text, mask = small_inputs()
    times = np.array([0.02, 0.7], np.float32)
    module = Denoiser(**(SMALL | {"refiner_depth": 0}))
    params = randomized(module, latents, times, text, mask)
    x0 = -run(module, params, latents, times, text, mask)
    velocity = run(module.clone(prediction="sample"), params, latents, times, text, mask)
    np.testing.assert_allclose(velocity[0], (latents[0] - x0[0]) / 0.05, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(latents[1] - times[1] * velocity[1], x0[1], rtol=1e-4, atol=1e-3)


def test_sinusoids_tell_places_apart():
    table = positions.sinusoids(5, 7, 48)
    assert table.shape == (35, 48)
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert np.min(distance + 10 * np.eye(35)) > 0.5
    row, column = 3, 2
    frequency = 10000.0 ** (-np.arange(12) / 12)
    expected = np.concatenate([f(place * frequency) for place in (row, column) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(table[row * 7 + column], expected, atol=1e-6)


def test_sinusoidal_positions_are_added_to_the_embedded_patches_of_every_frame():
    """With a square, invertible patch embedding the same can be added to the patches themselves."""
    options = SMALL | {"channels": 3, "patch_size": 4, "refiner_depth": 0}
    rng = np.random.default_rng(0)
    latents, reference = rng.normal(size=(2, 1, 12, 20, 3)).astype(np.float32)
    arguments = small_inputs(batch=1)[1:]
    params = randomized(Denoiser(**options), latents, *arguments)
    params["patch_embedding"]["kernel"] = jnp.asarray(np.linalg.qr(rng.normal(size=(48, 48)))[0], jnp.float32)
    table = positions.sinusoids(3, 5, 48) @ np.linalg.inv(params["patch_embedding"]["kernel"])
    shift = table.reshape(1, 3, 5, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(latents.shape).astype(np.float32)
    expected = run(Denoiser(**options), params, latents + shift, *arguments, reference + shift)
    module = Denoiser(**options, position_embedding="sinusoidal")
    assert relative(run(module, params, latents, *arguments, reference), expected) <= 1e-4
    assert relative(run(module, params, latents, *arguments, reference + shift), expected) > 1e-2


def test_patch_size_and_padding_of_a_small_network():
    module = Denoiser(**(SMALL | {"channels": 3, "refiner_depth": 0}), patch_size=4, pad_multiple=1)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    arguments = (latents, *small_inputs(text=5)[1:])
    params = randomized(module, *arguments)
    assert "noise_refiner" not in params and "context_refiner" not in params
    assert run(module, params, *arguments, latents).shape == latents.shape
    # Without padding, hiding pads changes nothing.
    np.testing.assert_allclose(
        run(module.clone(pad_tokens="mask"), params, *arguments, latents),
        run(module, params, *arguments, latents),
        rtol=1e-4,
        atol=1e-4,
    )


def test_initialisation_starts_at_zero_output_and_learns():
    arguments = small_inputs()
    module = Denoiser(**(SMALL | {"refiner_depth": 0}), prediction="sample")
    params = quick(module.init)(jax.random.key(0), *arguments)["params"]
    latents, times = arguments[:2]
    np.testing.assert_allclose(
        run(module, params, *arguments), latents / times[:, None, None, None], rtol=1e-5, atol=1e-5
    )

    def descend(params, _):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean(jnp.square(apply(module, p, *arguments) - 1.0)))(params)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient), loss

    params, losses = quick(lambda p: jax.lax.scan(descend, p, length=30))(params)
    assert losses[-1] < 0.6 * losses[0]
    assert np.any(np.asarray(params["layers"]["modulation"]["kernel"]))


def test_full_size_has_as_many_parameters_as_z_image():
    module = Denoiser()
    shapes = jax.eval_shape(
        module.init,
        jax.random.key(0),
        jnp.zeros((1, 4, 4, 16)),
        jnp.zeros(1),
        jnp.zeros((1, 4, 2560)),
        jnp.ones((1, 4)),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 6_154_908_736
    assert shapes["params"]["layers"]["attention"]["query"]["kernel"].shape == (30, 3840, 3840)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"pad_tokens": "drop"}, {}, "unknown pad_tokens 'drop'"),
        ({"prediction": "noise"}, {}, "unknown prediction 'noise'"),
        ({"rope_widths": (8, 8, 4)}, {}, "rope_widths must add up"),
        ({"rope_lengths": (66, 16, 16)}, {}, "rope_lengths of at least"),
        ({}, {0: np.zeros((2, 5, 10, 4))}, "multiples of 2"),
        ({}, {2: np.zeros((2, 40, 19))}, "expected caption features"),
        ({}, {4: np.zeros((2, 6, 8, 4))}, "expected a reference of the latents' shape"),
    ],
)
def test_errors_say_what_is_wrong(options, changes, message):
    arguments = list(small_inputs()) + [small_inputs()[0]]
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Denoiser(**(SMALL | options)).init, jax.random.key(0), *arguments)
