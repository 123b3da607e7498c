"""The edit stage's losses and gradients against the PyTorch release's own trainer, and over batches.

The golden runs are float32 at batch 1, with every random draw saved: one step, two steps, and "do nothing".
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from npedit_jax import weights
from npedit_jax.objectives import unroll
from npedit_jax.sampling import decode
from npedit_jax.training import edit_losses
from npedit_jax.training.edit_losses import Conditions, EditSettings, LossDraws, StudentDraws
from npedit_jax.weights.kinds import kind_module

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TIMES = (1.0, 0.9474, 0.8571, 0.6667)
SETTINGS = EditSettings(times=TIMES)
# Of each case: the trainer's step, caption lengths (instruction, edited caption, negative), guidance, second time,
# wanted answers, images of the edit question, weight of the identity loss.
CASES = {
    "u1": (306, (35, 22, 26), 3.5, None, (1, 1), 2, 0.0),
    "u2": (1401, (16, 37, 38), 7.5, 0.8571, (0, 1), 1, 0.0),
    "u2nothing": (2506, (41, 20, 43), 3.5, 0.6667, (1, 1), 2, 1.0),
}
IMAGE_TOKEN, PAD, IMAGE_TOKENS = 288, 283, 16
QUESTION_LENGTH = 444  # of the longest; one for all cases, so that a program serves several


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything one call of a loss takes."""

    step: int
    two_steps: bool
    given: Conditions
    batch: dict
    draws: tuple[StudentDraws, LossDraws]
    fake_draws: tuple[StudentDraws, LossDraws]


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "G" / "golden.safetensors")


@functools.cache
def networks() -> tuple[dict, dict]:
    places = {
        "student": ("zimage", "G/student/transformer", {"pad_tokens": "mask"}),
        "fake_score": ("zimage", "F/aux/transformer", {}),
        "real_score": ("zimage", "A/transformer", {}),
        "autoencoder": ("autoencoder", "B/vae", {}),
        "scorer": ("internvl", "D/internvl_chat", {}),
    }
    loaded = {name: weights.load(kind, GOLDEN / place, **options) for name, (kind, place, options) in places.items()}
    return tuple({name: pair[i] for name, pair in loaded.items()} for i in (0, 1))


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x[:, :, 0].transpose(0, 2, 3, 1))


def questions(name: str, images: int) -> dict[str, jax.Array]:
    """The release's two prompts, cut before the answer and padded."""
    rows = []
    for key, count in (("input_ids", images), ("input_ids_identity", 2)):
        ids, labels = golden()[f"{name}.{key}"][0], golden()[f"{name}.{key.replace('input_ids', 'labels')}"][0]
        ids = ids[: int(np.flatnonzero(labels >= 0)[0])]
        places = ids == IMAGE_TOKEN
        index = np.full(len(ids), -1)
        index[places] = np.arange(places.sum()) + (2 - count) * IMAGE_TOKENS
        rows.append((ids, index))
    pad = lambda x, value: np.pad(x, (0, QUESTION_LENGTH - len(x)), constant_values=value)  # noqa: E731
    return {
        "question_ids": jnp.asarray([[pad(ids, PAD) for ids, _ in rows]]),
        "question_mask": jnp.asarray([[pad(np.ones(len(ids), bool), False) for ids, _ in rows]]),
        "image_index": jnp.asarray([[pad(index, -1) for _, index in rows]]),
    }


def text(name: str, length: int) -> tuple[jax.Array, jax.Array]:
    hidden = golden()[name]
    return jnp.asarray(hidden), jnp.arange(hidden.shape[1])[None] < length


def case(name: str) -> Case:
    step, lengths, guidance, second, answer, images, identity = CASES[name]
    tensor = lambda key: channels_last(golden()[f"{name}.{key}"])  # noqa: E731
    texts = [text(f"{name}.{key}", length) for key, length in zip(("txt", "otxt", "utxt"), lengths, strict=True)]

    def student_draws(prefix: str) -> StudentDraws:
        start = tensor("noise")
        again = tensor(f"{prefix}unroll_noise0") if second else jnp.zeros_like(start)
        return StudentDraws(start, jnp.full((1,), second or 0.5), again)

    losses = LossDraws(jnp.asarray(golden()[f"{name}.tau"]), tensor("dmd_noise"), None)
    fake_losses = LossDraws(jnp.asarray(golden()[f"{name}.aux.tau"]), tensor("aux.noise"), None)
    batch = questions(name, images) | {
        "answer": jnp.asarray([answer]),
        "question_weight": jnp.ones((1, 2)),
        "guidance": jnp.full((1,), guidance),
        "dmd_weight": jnp.ones((1,)),
        "identity_weight": jnp.full((1,), identity),
        "weight": jnp.ones((1,)),
    }
    return Case(
        step,
        second is not None,
        Conditions(tensor("images"), tensor("z"), *texts),
        batch,
        (student_draws(""), losses),
        (student_draws("aux."), fake_losses),
    )


@functools.partial(jax.jit, static_argnames="two_steps")
def student_gradients(params, given, batch, draws, step, two_steps):
    modules, _ = networks()
    loss = lambda student, probes: edit_losses.student_loss(  # noqa: E731
        {"params": student},
        {"params": params["fake_score"]},
        params,
        modules,
        batch,
        given,
        draws,
        step,
        SETTINGS,
        two_steps=two_steps,
        probes=probes,
    )
    probes = {name: jnp.zeros_like(given.reference) for name in edit_losses.PROBES}
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params["student"], probes)


@functools.partial(jax.jit, static_argnames="two_steps")
def edited(params, given, draws, two_steps):
    return edit_losses.edit(networks()[0], {"params": params["student"]}, given, draws, two_steps=two_steps)


@jax.jit
def judged(params, given, batch, x0):
    """Pixels, and the scorer's logits about them."""
    modules, _ = networks()
    decoded = decode(modules, params, x0)
    return decoded, edit_losses.answers(modules, params["scorer"], given.pixels, decoded, batch).logits


@functools.partial(jax.jit, static_argnames="two_steps")
def fake_gradients(params, given, batch, draws, two_steps):
    modules, _ = networks()
    loss = lambda fake: edit_losses.fake_score_loss(  # noqa: E731
        {"params": fake}, {"params": params["student"]}, modules, batch, given, draws, two_steps=two_steps
    )
    return jax.value_and_grad(loss)(params["fake_score"])


def by_source(name: str, gradients: dict) -> dict[str, np.ndarray]:
    """Gradients under the original's names and in its layout."""
    found = {}
    flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    for row in kind_module("zimage").rows(networks()[0][name]):
        for layer, source in enumerate(row.names()):
            leaf = np.asarray(flat[row.target])
            found[source] = row.to_source(leaf[layer] if row.layers else leaf)
    return found


def assert_near(found, expected, tolerance: float) -> None:
    """Relative L2."""
    assert jnp.linalg.norm(found - expected) <= tolerance * jnp.linalg.norm(expected)


def assert_gradients(name: str, gradients: dict, prefix: str) -> None:
    """Norms of all gradients, and those that were saved whole; the pad tokens are frozen in the original."""
    found = by_source(name, gradients)
    names = json.loads((GOLDEN / "G" / "param_names.json").read_text())
    norms = golden()[f"{prefix}.grad_norms"]
    floor = 1e-6 * np.linalg.norm(norms)
    for key, norm in zip(names, norms, strict=True):
        if "pad_token" not in key:
            assert abs(np.linalg.norm(found[key]) - norm) <= 1e-4 * norm + floor, key
    whole = [key for key in golden() if key.startswith(f"{prefix}.grad.")]
    assert whole
    for key in whole:
        expected = golden()[key]
        difference = np.linalg.norm(found[key.removeprefix(f"{prefix}.grad.")] - expected)
        assert difference <= 1e-4 * np.linalg.norm(expected) + floor, key


@pytest.mark.parametrize("name", CASES)
def test_edit_pixels_and_answers_equal_the_release(name):
    run, expected = case(name), golden()
    params, x0 = networks()[1], channels_last(expected[f"{name}.x0_pred"])
    assert_near(edited(params, run.given, run.draws[0], run.two_steps), x0, 2e-5 * (1 + run.two_steps))
    decoded, logits = judged(params, run.given, run.batch, x0)
    assert_near(decoded, channels_last(expected[f"{name}.decoded"]), 2e-5)
    assert_near(logits[0], expected[f"{name}.score_logits"], 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_student_step_equals_the_release(name):
    run = case(name)
    (total, metrics), (gradients, at_x0) = student_gradients(
        networks()[1], run.given, run.batch, run.draws, run.step, run.two_steps
    )
    expected = golden()
    np.testing.assert_allclose(metrics["loss/dmd"], expected[f"{name}.dmd_loss_vec"][0], rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/scorer"], expected[f"{name}.critic_loss_vec"][0], rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/identity"], expected[f"{name}.mse_loss_vec"][0], rtol=1e-4)
    np.testing.assert_allclose(total, expected[f"{name}.total.loss"], rtol=1e-4)
    for question, answer in zip(("edit", "identity"), run.batch["answer"][0], strict=True):
        yes = expected[f"{name}.score_{question}"][0]
        np.testing.assert_allclose(metrics[f"scorer/{question}"], yes if answer else 1.0 - yes, rtol=1e-4)
    assert_gradients("student", gradients, f"{name}.total")
    # In x0 each part by itself; the original's, without weights, have that of the identity loss in them.
    x0 = channels_last(expected[f"{name}.x0_pred"])
    identity = run.batch["identity_weight"][0] * 2.0 * (x0 - run.given.reference) / x0.size
    for probe, weight, part in (("dmd", SETTINGS.dmd_weight, "dmd"), ("scorer", SETTINGS.scorer_weight, "critic")):
        assert_near(at_x0[probe], weight * (channels_last(expected[f"{name}.{part}.dx0"]) - identity), 1e-4)
    assert_near(at_x0["dmd"] + at_x0["scorer"] + identity, channels_last(expected[f"{name}.total.dx0"]), 1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("part", ["dmd", "critic"])
def test_each_loss_by_itself_equals_the_release(name, part):
    """Beside the identity loss. The other has weight 0 in the batch, so that the program is that of the whole step."""
    run, expected = case(name), golden()
    if part == "dmd":
        scale, changes = SETTINGS.dmd_weight, {"question_weight": jnp.zeros((1, 2))}
    else:  # without a weight in the original
        scale = SETTINGS.scorer_weight
        changes = {"dmd_weight": jnp.zeros((1,)), "identity_weight": scale * run.batch["identity_weight"]}
    (total, _), (gradients, _) = student_gradients(
        networks()[1], run.given, run.batch | changes, run.draws, run.step, run.two_steps
    )
    np.testing.assert_allclose(total / scale, expected[f"{name}.{part}.loss"], rtol=1e-4)
    assert_gradients("student", jax.tree.map(lambda x: x / scale, gradients), f"{name}.{part}")


@pytest.mark.parametrize("name", ["a", "b"])
def test_dmd_equals_the_release(name):
    """By itself, with a guidance scale and a caption's length per sample."""
    found = load_file(GOLDEN / "F" / "golden.safetensors")
    modules, params = networks()
    tensor = lambda key: channels_last(found[f"{name}.{key}"])  # noqa: E731
    mask = lambda kind: np.arange(found[f"{name}.{kind}_txt"].shape[1])[None] < found[f"{name}.{kind}_lens"][:, None]  # noqa: E731
    caption = (jnp.asarray(found[f"{name}.orig_txt"]), mask("orig"))
    negative = (jnp.asarray(found[f"{name}.uncond_txt"]), mask("uncond"))
    length = max(x[0].shape[1] for x in (caption, negative))
    grow = lambda x: jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    caption, negative = jax.tree.map(grow, (caption, negative))
    given = Conditions(None, None, None, caption, negative)
    draws = LossDraws(jnp.asarray(found[f"{name}.tau"]), tensor("noise"), None)

    @jax.jit
    def losses(x0):
        fake = {"params": params["fake_score"]}
        rest = (given, jnp.asarray(found[f"{name}.cfg"]), draws, SETTINGS)
        loss = edit_losses.dmd_loss(modules, params["real_score"], fake, x0, *rest)
        return loss.sum(), loss

    (_, loss), gradient = jax.value_and_grad(losses, has_aux=True)(tensor("x0"))
    np.testing.assert_allclose(loss, found[f"{name}.loss_vec"], rtol=1e-4)
    assert_near(gradient, tensor("dx0"), 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_fake_score_step_equals_the_release(name):
    run = case(name)
    loss, gradients = fake_gradients(networks()[1], run.given, run.batch, run.fake_draws, run.two_steps)
    np.testing.assert_allclose(loss, golden()[f"{name}.aux.loss"], rtol=1e-4)
    assert_gradients("fake_score", gradients, f"{name}.aux")


def padded(cases: list[Case]) -> list[Case]:
    """The cases with texts and questions padded to one length."""

    def grow(name: str, *leaves: jax.Array) -> list[jax.Array]:
        shape = np.max([leaf.shape for leaf in leaves], axis=0)
        value = -1 if name == "image_index" else 0
        pads = [[(0, int(full - own)) for full, own in zip(shape, leaf.shape, strict=True)] for leaf in leaves]
        return [jnp.pad(leaf, pad, constant_values=value) for leaf, pad in zip(leaves, pads, strict=True)]

    batches = {name: grow(name, *(c.batch[name] for c in cases)) for name in cases[0].batch}
    texts = {
        name: [grow(name, *(getattr(c.given, name)[part] for c in cases)) for part in (0, 1)]
        for name in ("instruction", "caption", "negative")
    }
    return [
        dataclasses.replace(
            c,
            batch={name: batches[name][i] for name in batches},
            given=c.given._replace(**{name: tuple(part[i] for part in parts) for name, parts in texts.items()}),
        )
        for i, c in enumerate(cases)
    ]


@functools.cache
def four() -> list[Case]:
    """Samples each with a time, guidance, answers, question kind and weights of its own."""
    two_images, one_image, other = case("u2nothing"), case("u2"), case("u1")
    singles = padded([two_images, one_image, other, two_images])
    changed = (
        (0.6667, {}),
        (0.8571, {"question_weight": jnp.asarray([[1.0, 0.0]])}),
        (0.9474, {"guidance": jnp.full((1,), 7.5), "dmd_weight": jnp.zeros((1,))}),
        (0.8571, {"answer": 1 - two_images.batch["answer"], "identity_weight": jnp.full((1,), 0.5)}),
    )
    return [
        dataclasses.replace(
            one,
            batch=one.batch | fields,
            # The negative prompt is one for the whole batch.
            given=one.given._replace(negative=singles[0].given.negative),
            draws=(one.draws[0]._replace(second_time=jnp.full((1,), second)), one.draws[1]),
        )
        for one, (second, fields) in zip(singles, changed, strict=True)
    ]


@functools.cache
def alone(number: int):
    """Loss and gradients of one of the four by itself."""
    one = four()[number]
    (total, _), (gradients, _) = student_gradients(networks()[1], one.given, one.batch, one.draws, 2506, True)
    return total, gradients


@pytest.mark.parametrize("counted", [(0, 1, 2, 3), (1, 2, 3)])
def test_a_batch_of_four_gives_the_mean_of_its_samples(counted):
    """Of those that count: samples of weight 0 change nothing."""
    join = lambda *trees: jax.tree.map(lambda *x: jnp.concatenate(x), *trees)  # noqa: E731
    given = join(*(one.given for one in four()))._replace(negative=four()[0].given.negative)
    batch, draws = (join(*(getattr(one, name) for one in four())) for name in ("batch", "draws"))
    batch |= {"weight": jnp.zeros(4).at[jnp.array(counted)].set(1.0)}
    (total, _), (gradients, _) = student_gradients(networks()[1], given, batch, draws, 2506, True)
    expected = [alone(number) for number in counted]
    np.testing.assert_allclose(total, np.mean([loss for loss, _ in expected]), rtol=1e-5)
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *(g for _, g in expected))
    difference = jax.tree.map(jnp.subtract, gradients, mean)
    assert optax.tree.norm(difference) <= 2e-5 * optax.tree.norm(mean)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampler_equals_the_release(eta):
    run = case("u2nothing")
    modules, params = networks()
    velocity = jax.jit(
        lambda x, t: modules["student"].apply(
            {"params": params["student"]}, x, t, *run.given.instruction, run.given.reference
        )
    )
    fresh = [channels_last(golden()[f"infer.eta{eta}.noise{i}"]) for i in range(3)]
    times = [jnp.full((1,), t) for t in TIMES]
    found = unroll.sample(velocity, run.draws[0].noise, times, fresh, sampler="ddim", eta=eta)
    assert_near(found, channels_last(golden()[f"infer.eta{eta}.x"]), 2e-5 * len(TIMES))


def test_second_time_is_drawn_per_sample_among_the_later_times():
    draws = edit_losses.draw_student(jax.random.key(0), (4000, 1, 1, 1), TIMES)
    values, counts = np.unique(np.asarray(draws.second_time), return_counts=True)
    np.testing.assert_allclose(values, sorted(TIMES[1:]), rtol=1e-6)
    assert counts.min() > 1200


def test_two_steps_are_drawn_in_three_of_four_outer_steps():
    drawn = [bool(edit_losses.draw_two_steps(jax.random.key(i), SETTINGS)) for i in range(400)]
    assert abs(np.mean(drawn) - 0.75) < 0.07
    assert not edit_losses.draw_two_steps(jax.random.key(0), dataclasses.replace(SETTINGS, max_unroll=1))


def test_clip_for_the_scorer_keeps_the_gradient_of_pixels_out_of_range():
    run = case("u1")
    modules, params = networks()
    decoder = params["autoencoder"]["decoder"]
    loud = jax.tree.map(lambda x: 5.0 * x, decoder["conv_out"])  # decodes far beyond [-1, 1]
    params = params | {"autoencoder": params["autoencoder"] | {"decoder": decoder | {"conv_out": loud}}}

    def gradient(settings):
        loss = lambda x: edit_losses.scorer_loss(  # noqa: E731
            modules, params, x, run.batch, run.given, None, run.step, settings
        )[0].sum()
        return jax.jit(jax.value_and_grad(loss))(run.given.reference)

    (plain, stopped), (clipped, kept) = (
        gradient(dataclasses.replace(SETTINGS, scorer_clip=clip)) for clip in (False, True)
    )
    np.testing.assert_allclose(clipped, plain, rtol=1e-3)
    assert jnp.linalg.norm(kept) > 1.2 * jnp.linalg.norm(stopped)
