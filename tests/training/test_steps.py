"""The steps before the edit stage against their formulas in numpy, with networks of one line each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from npedit_jax.models.scorer import ScorerOutput
from npedit_jax.training import optimizer, stages, state, steps

SIDE, TEXT, SHIFT = 64, 3, 6.0
SCALE = 0.7  # of the autoencoder
RATE = 1e4  # of gradients of one over thousands of latents: a parameter's rounding is nothing to its step
WEIGHTS = {
    "uniform": np.ones_like,
    "time": lambda t: t,
    "clean": lambda t: t**2,
    "logit_normal": lambda t: np.exp(-(np.log(t / (1 - t)) ** 2) / 2) / (np.sqrt(2 * np.pi) * t * (1 - t)),
}


class Autoencoder:
    """Latents are two of the colours, scaled; decoded they are half as strong."""

    def apply(self, variables, x, *, method):
        scale = variables["params"]
        return scale * x[..., :2] if method == "encode" else jnp.pad(0.5 * x / scale, [(0, 0)] * 3 + [(0, 1)])


class TextEncoder:
    """Hidden states are the tokens themselves."""

    def apply(self, variables, ids, mask):
        return variables["params"] * ids[..., None]


class Denoiser:
    """Predicts its parameter, whatever it is shown, and keeps that."""

    def __init__(self):
        self.seen = []

    def apply(self, variables, *shown):
        self.seen.append(shown)
        return variables["params"]["velocity"]


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3)).astype(np.uint8))


def flow_batch() -> dict[str, jax.Array]:
    """Fields of all three stages, each with values of its own; the second sample does not count."""
    rng = np.random.default_rng(1)
    pictures = {name: images(2, SIDE, SIDE) + number for number, name in enumerate(("image", "reference", "target"))}
    ids = {f"{name}_ids": jnp.asarray(rng.integers(0, 9, (2, TEXT))) for name in ("caption", "instruction")}
    masks = {f"{name}_mask": jnp.asarray([[True] * 3, [True, False, False]]) for name in ("caption", "instruction")}
    return pictures | ids | masks | {"weight": jnp.asarray([1.0, 0.0])}


def flow_step(stage: str, denoiser: Denoiser, rule: optax.GradientTransformation, **settings):
    """The step of a stage, the state that it starts from and the frozen networks."""
    name = "denoiser" if stage == "base" else "student"
    modules = {"autoencoder": Autoencoder(), "text_encoder": TextEncoder(), name: denoiser}
    config = ConfigDict(dict(step=dict(ema=0.9, weighting="uniform", endpoint=0.0, time_shift=SHIFT) | settings))
    velocity = jax.random.normal(jax.random.key(5), (2, SIDE, SIDE, 2))
    start = state.create({name: {"velocity": velocity, "x_pad_token": jnp.ones(2)}}, {name: rule}, (name,))
    frozen = {"autoencoder": jnp.float32(SCALE), "text_encoder": jnp.float32(2.0)}
    return stages.STEPS[stage](config, modules, {name: rule}), start, frozen


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize(
    ("stage", "target", "text", "reference"),
    [
        ("base", "image", "caption", None),
        ("warmup", "reference", "caption", "reference"),
        ("supervised", "target", "instruction", "reference"),
    ],
)
def test_flow_step_equals_its_formula(stage, target, text, reference, weighting):
    """Loss and gradient of a velocity; the noise follows from what the denoiser was shown."""
    denoiser, batch = Denoiser(), flow_batch()
    step, start, frozen = flow_step(stage, denoiser, optax.sgd(RATE), weighting=weighting, skip_norm=1e9)
    end, metrics = step(start, frozen, batch, jax.random.key(0))
    ((x_t, t, hidden, mask, shown),) = jax.device_get(denoiser.seen)
    latents = {
        name: SCALE * (np.asarray(batch[name])[..., :2] / 127.5 - 1.0) for name in ("image", "reference", "target")
    }
    np.testing.assert_allclose(hidden[..., 0], 2.0 * batch[f"{text}_ids"])
    np.testing.assert_array_equal(mask, batch[f"{text}_mask"])
    assert shown is None if reference is None else np.allclose(shown, latents[reference], atol=1e-6)
    clean, t = latents[target], t.astype(np.float64)
    time = t[:, None, None, None]
    noise = (x_t - (1 - time) * clean) / time
    assert np.all(np.abs(noise.mean((1, 2, 3))) < 0.05) and np.all(np.abs(noise.std((1, 2, 3)) - 1) < 0.05)
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.05
    (name,) = start.params
    error = np.asarray(start.params[name]["velocity"]) - (noise - clean)
    weight = WEIGHTS[weighting](t)
    np.testing.assert_allclose(metrics["loss"], weight[0] * np.mean(error[0] ** 2), rtol=1e-4)
    gradient = np.stack([2 * weight[0] * error[0] / error[0].size, 0 * error[1]])
    moved = (start.params[name]["velocity"] - end.params[name]["velocity"]) / RATE
    assert np.linalg.norm(moved - gradient) <= 1e-3 * np.linalg.norm(gradient)
    np.testing.assert_allclose(metrics[f"gradient_norm/{name}"], np.linalg.norm(gradient), rtol=1e-4)


@pytest.mark.parametrize("endpoint", [0.0, 0.3])
def test_times_of_the_flow_are_uniform_before_their_shift(endpoint):
    denoiser, count = Denoiser(), 4000
    variables = {"params": {"velocity": jnp.zeros((count, 1, 1, 1))}}
    options = dict(time_shift=SHIFT, endpoint=endpoint)
    steps.flow_loss(denoiser, variables, jnp.zeros((count, 1, 1, 1)), (None, None), jax.random.key(0), **options)
    t = np.asarray(denoiser.seen[0][1])
    assert abs(np.mean(t == 1.0) - endpoint) < 0.03
    drawn = np.sort(t[t < 1.0])
    drawn = drawn / (SHIFT - (SHIFT - 1.0) * drawn)
    np.testing.assert_allclose(drawn, (np.arange(drawn.size) + 0.5) / drawn.size, atol=0.03)


def test_a_large_gradient_is_skipped_from_its_step_on():
    """Pad tokens stay under weight decay, in the steps that are not skipped too."""
    rule = optimizer.build("adam", learning_rate=1e-2, b1=0.9, b2=0.99, weight_decay=0.1)
    step, now, frozen = flow_step("warmup", Denoiser(), rule, skip_norm=1e-6, skip_from=2)
    batch, start = flow_batch(), now
    for number, skipped in enumerate((0, 0, 1, 2)):
        before = now
        now, metrics = step(now, frozen, batch, jax.random.key(number))
        assert metrics["gradient_norm/student"] > 1e-6
        assert int(metrics["skipped/student"]) == skipped and int(now.step) == number + 1
        moved = np.any(before.params["student"]["velocity"] != now.params["student"]["velocity"])
        assert moved == (number < 2)
    np.testing.assert_array_equal(now.params["student"]["x_pad_token"], start.params["student"]["x_pad_token"])
    step, start, frozen = flow_step("warmup", Denoiser(), rule, skip_norm=1e9, skip_from=2)
    _, metrics = step(start, frozen, batch | {"weight": jnp.asarray([jnp.nan, 0.0])}, jax.random.key(0))
    assert int(metrics["skipped/student"]) == 1  # one that is not finite, before that step too


class Scorer:
    """An image's token is its mean; logits are those tokens and a parameter."""

    def apply(self, variables, *arguments, method):
        if method == "encode_images":
            return arguments[0].mean((2, 3))  # [B, I, C]
        table, ids, mask, index, answers = arguments
        assert method == "answer" and answers.shape == (*ids.shape[:2], 2)
        first, second = (table[:, None, image, 0] * jnp.ones(ids.shape[:2]) for image in (0, 1))
        logits = jnp.stack([first, second], -1) + variables["params"]["bias"][None, None]
        return ScorerOutput(logits, jax.nn.logsumexp(jnp.concatenate([logits, jnp.zeros_like(logits)], -1), -1))


@pytest.mark.parametrize("roundtrip", [0.0, 1.0])
def test_scorer_step_equals_its_formula(roundtrip):
    """Three questions of two samples, the last one of the second without weight; an answer between Yes and No."""
    rule = optax.sgd(RATE)
    settings = dict(ema=0.9, skip_norm=1e9, roundtrip=roundtrip, latent_noise=0.0)
    modules = {"scorer": Scorer(), "autoencoder": Autoencoder()}
    step = steps.scorer_step(modules, {"scorer": rule}, **settings)
    bias = np.float32([0.3, 1.5])
    start = state.create({"scorer": {"bias": jnp.asarray(bias)}}, {"scorer": rule}, ("scorer",))
    zeros = jnp.zeros((2, 3, 4), jnp.int32)
    answer, weight = np.float32([[1.0, 0.0, 0.8], [0.0, 1.0, 1.0]]), np.float32([[1.0, 1.0, 0.5], [1.0, 2.0, 0.0]])
    batch = {
        "images": images(2, 2, 8, 8),
        "question_ids": zeros,
        "question_mask": zeros > -1,
        "image_index": zeros,
        "answer_ids": zeros[..., :2],
        "answer": jnp.asarray(answer),
        "question_weight": jnp.asarray(weight),
    }
    end, metrics = step(start, {"autoencoder": jnp.float32(SCALE)}, batch, jax.random.key(0))
    tokens = (np.asarray(batch["images"]) / 127.5 - 1.0).mean((2, 3))[..., 0] * [1.0, 0.5 if roundtrip else 1.0]
    logits = np.broadcast_to((tokens + bias)[:, None], (2, 3, 2)).astype(np.float64)
    whole = np.log(np.exp(logits).sum(-1) + 2.0)
    log_no, log_yes = logits[..., 0] - whole, logits[..., 1] - whole
    losses = -(answer * log_yes + (1 - answer) * log_no)
    np.testing.assert_allclose(metrics["loss"], np.mean((losses * weight).sum(1) / weight.sum(1)), rtol=1e-5)
    right = (np.exp(log_yes) > 0.5) == (answer > 0.5)
    np.testing.assert_allclose(metrics["right"], (right * weight).sum() / weight.sum(), rtol=1e-6)
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2)) * 0.5 / weight.sum()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    share = weight / weight.sum(1, keepdims=True) / 2
    gradient = [np.sum(share * (np.exp(log) - wanted)) for log, wanted in ((log_no, 1 - answer), (log_yes, answer))]
    np.testing.assert_allclose((bias - end.params["scorer"]["bias"]) / RATE, gradient, rtol=1e-3)
