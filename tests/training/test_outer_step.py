"""The outer step as a whole, on networks of a few hundred parameters: what moves, what stays, what is reported."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from npedit_jax.training import accumulation, edit_losses, edit_step, optimizer, state, steps
from npedit_jax.training.edit_losses import EditSettings
from tests.training.tiny_networks import INNER, batches, parts

# A weight per latent pixel divides by differences near 0, which no two programs round alike.
SETTINGS = EditSettings(times=(1.0, 0.5), scorer_weight=0.5, skip_norm=1e9, dmd_normalizer="sample")


class Recorded(NamedTuple):
    """The gradients of the last update, as they were before the optimizer."""

    gradients: dict


def recording() -> optax.GradientTransformation:
    """Leaves gradients as they are and keeps them in its state."""
    return optax.GradientTransformation(
        lambda params: Recorded(jax.tree.map(jnp.zeros_like, params)),
        lambda gradients, state, params=None: (gradients, Recorded(gradients)),
    )


def make_updates():
    """The updates, a state to start from, and the frozen parameters."""
    modules, params = parts()
    adam = optimizer.build("adam", learning_rate=2e-5, b1=0.0, b2=0.9, clip_norm=2.0)
    rules = {name: optax.chain(recording(), adam) for name in ("student", "fake_score")}
    trained = {name: params[name] for name in rules}
    frozen = {name: value for name, value in params.items() if name not in rules}
    return edit_step.Updates(modules, rules, SETTINGS), state.create(trained, rules, ("student",)), frozen


@functools.cache
def programs(accumulate=1):
    """The updates as programs of their own, which take the state over."""
    updates = make_updates()[0]
    updates = dataclasses.replace(updates, settings=dataclasses.replace(SETTINGS, accumulate=accumulate))
    return {name: jax.jit(part, donate_argnums=0) for name, part in edit_step.parts(updates).items()}


@functools.cache
def stepper():
    updates, start, frozen = make_updates()
    return jax.jit(edit_step.outer_step(updates)), start, frozen


def change(before, after) -> dict[str, float]:
    return {
        jax.tree_util.keystr(path): float(jnp.abs(a - b).max())
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    }


def test_both_networks_move_and_the_pad_tokens_stay():
    step, start, frozen = stepper()
    end, metrics = step(start, frozen, batches(), jax.random.key(0))
    assert int(end.step) == 1
    for name in ("student", "fake_score"):
        moved = change(start.params[name], end.params[name])
        assert all(value == 0.0 for path, value in moved.items() if "pad_token" in path)
        assert sum(value > 0 for value in moved.values()) > 0.8 * len(moved)
    assert {"loss", "loss/dmd", "loss/scorer", "loss/fake_score", "scorer/edit", "unroll"} <= metrics.keys()
    assert metrics["gradient_at_x0/dmd"] > 0 and metrics["gradient_at_x0/scorer"] > 0
    assert all(np.isfinite(value) for value in jax.tree.leaves(metrics))


def test_step_is_a_pure_function_of_its_arguments():
    step, start, frozen = stepper()
    first, again = (step(start, frozen, batches(), jax.random.key(0)) for _ in range(2))
    other = step(start, frozen, batches(), jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert float(other[1]["loss"]) != float(first[1]["loss"])


def test_both_lengths_are_drawn():
    step, start, frozen = stepper()
    lengths = {int(step(start, frozen, batches(), jax.random.key(seed))[1]["unroll"]) for seed in range(8)}
    assert lengths == {1, 2}


def spoil_batch(field, place, batch, frozen):
    batch[field][place] = np.nan
    return batch, frozen


def spoil_network(name, batch, frozen):
    return batch, frozen | {name: jax.tree.map(lambda x: x * jnp.float32(jnp.nan), frozen[name])}


@pytest.mark.parametrize(
    ("spoil", "skipped"),
    [
        (functools.partial(spoil_batch, "weight", 0), {"fake_score": 1, "student": 0}),
        (functools.partial(spoil_batch, "guidance", INNER - 1), {"fake_score": 0, "student": 1}),
        (functools.partial(spoil_network, "scorer"), {"fake_score": 0, "student": 1}),
        (functools.partial(spoil_network, "text_encoder"), {"fake_score": INNER - 1, "student": 1}),
    ],
    ids=["first batch", "last batch", "logits", "everything"],
)
def test_step_with_nan_changes_nothing_and_is_counted(spoil, skipped):
    step, start, frozen = stepper()
    batch, spoiled = spoil(batches(), frozen)
    end, metrics = step(start, spoiled, batch, jax.random.key(0))
    for name, count in skipped.items():
        moved = any(change(start.params[name], end.params[name]).values())
        assert moved == (count < {"fake_score": INNER - 1, "student": 1}[name])
        assert int(end.skipped[name]) == int(metrics[f"skipped/{name}"]) == count
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((end.params, end.ema)))
    after, metrics = step(end, frozen, batches(), jax.random.key(1))
    assert int(after.step) == 2 and np.isfinite(metrics["loss"])


def copy(tree):
    """The separate programs take their state over; the tests go on using it."""
    return jax.tree.map(jnp.copy, tree)


def assert_close(found, expected, tolerance):
    """Each array to a tolerance relative to its norm, above rounding of the whole tree's."""
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(expected)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(a - b) <= tolerance * (jnp.linalg.norm(b) + 1e-3 * norm)


def test_separate_steps_are_the_one_program_over_five_steps():
    """Gradients before the optimizer at the first step of each length, losses at all; rate 2e-5, fixed keys."""
    one, start, frozen = stepper()
    separate = edit_step.separate_steps(programs(), SETTINGS)
    expected_state, found_state, lengths = copy(start), copy(start), set()
    for seed in range(5):
        arguments = (frozen, batches(), jax.random.key(seed))
        expected_state, expected = one(expected_state, *arguments)
        found_state, found = separate(found_state, *arguments)
        assert found.keys() == expected.keys()
        assert found["unroll"] == expected["unroll"]
        for name in ("loss", "loss/dmd", "loss/scorer", "loss/identity", "loss/fake_score"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
        if int(found["unroll"]) not in lengths:
            for name in ("student", "fake_score"):
                gradients = (s.optimizer[name][0].gradients for s in (found_state, expected_state))
                assert_close(*gradients, 1e-5)
        lengths.add(int(found["unroll"]))
    assert lengths == {1, 2}
    assert int(found_state.step) == 5


@pytest.mark.parametrize(("seed", "length"), [(0, 2), (3, 1)])
def test_separate_steps_run_the_programs_of_the_drawn_length(seed, length):
    parts_ = edit_step.parts(make_updates()[0])
    assert {name: part.keywords["two_steps"] for name, part in parts_.items()} == {
        "fake_score/1": False,
        "fake_score/2": True,
        "student/1": False,
        "student/2": True,
    }
    called = []

    def stand_in(name, state, frozen, batch, rng):
        called.append((name, batch["guidance"].tolist(), jax.random.key_data(rng).tolist()))
        return state, {}

    programs = {name: functools.partial(stand_in, name) for name in parts_}
    given = batches() | {"guidance": np.arange(2.0 * INNER).reshape(INNER, 2)}
    edit_step.separate_steps(programs, SETTINGS)(None, None, given, jax.random.key(seed))
    names, guidance, keys = zip(*called, strict=True)
    assert names == (f"fake_score/{length}",) * (INNER - 1) + (f"student/{length}",)
    assert guidance == tuple(given["guidance"].tolist()) and len({tuple(key) for key in keys}) == INNER


def test_decoupled_dmd_with_one_time_and_noise_is_the_usual():
    modules, params = parts()
    batch = jax.tree.map(lambda x: x[-1], batches())
    given = edit_losses.conditions(modules, params, batch)
    usual = edit_losses.draw(jax.random.key(0), given.reference.shape, SETTINGS, low=0.02, high=0.98)[1]
    x0 = jax.random.normal(jax.random.key(1), given.reference.shape)

    def gradient(draws, **changes):
        settings = dataclasses.replace(SETTINGS, **changes)
        loss = lambda x: jnp.sum(  # noqa: E731
            edit_losses.dmd_loss(modules, params["real_score"], fake, x, given, batch["guidance"], draws, settings)
        )
        return jax.jit(jax.value_and_grad(loss))(x0)

    fake = {"params": params["fake_score"]}
    same = usual._replace(guidance_time=usual.time, guidance_noise=usual.noise)
    expected = gradient(usual)
    assert_close(gradient(same, decoupled=True), expected, 2e-5)
    own = edit_losses.draw(
        jax.random.key(0), given.reference.shape, dataclasses.replace(SETTINGS, decoupled=True), low=0.02, high=0.98
    )[1]
    np.testing.assert_array_equal(own.time, usual.time)  # the option leaves every other draw as it was
    np.testing.assert_array_equal(own.noise, usual.noise)
    assert not np.allclose(gradient(own, decoupled=True)[1], expected[1])


@pytest.mark.parametrize("name", [pytest.param("student", marks=pytest.mark.slow), "fake_score"])
def test_a_batch_in_parts_gives_the_gradients_and_metrics_of_the_whole(name):
    """In parts of a sample each: a batch is the mean of its samples, with texts of different lengths."""
    _, start, frozen = make_updates()
    batch = jax.tree.map(lambda x: x[0], batches())
    batch |= {"guidance": np.float32([1.0, 3.0]), "identity_weight": np.float32([1.0, 0.5])}

    def run(accumulate, name):
        return programs(accumulate)[name](copy(start), frozen, batch, jax.random.key(0))

    (whole, metrics), (in_parts, metrics_in_parts) = (run(accumulate, f"{name}/1") for accumulate in (1, 2))
    found, expected = (end.optimizer[name][0].gradients for end in (in_parts, whole))
    difference = jax.tree.map(jnp.subtract, found, expected)
    assert optax.tree.norm(difference) <= 1e-5 * optax.tree.norm(expected), name
    for key, value in metrics.items():
        np.testing.assert_allclose(metrics_in_parts[key], value, rtol=1e-4, err_msg=key)
    with pytest.raises(ValueError, match="a batch of 2 cannot be cut into 3 equal parts"):
        run(3, "fake_score/1")


def test_parts_count_by_the_weight_of_their_samples():
    weight = jnp.asarray([1.0, 1.0, 0.0, 1.0])
    values = jnp.asarray([1.0, 2.0, jnp.pi, 9.0])
    key = jax.random.key(0)
    mean = lambda x, _: jnp.sum(x[0] * x[1]) / jnp.maximum(jnp.sum(x[1]), 1e-6)  # noqa: E731
    np.testing.assert_allclose(accumulation.mean(mean, (values, weight), weight, key, 2), 4.0, rtol=1e-6)
    assert accumulation.mean(mean, (values, 0 * weight), 0 * weight, key, 4) == 0.0


def test_a_warm_up_batch_in_parts_is_the_mean_of_them():
    modules, params = parts()
    batch = jax.tree.map(lambda x: np.concatenate([x[0], x[0]]) if x.shape[1] > 1 else x[0], batches())
    rules = {"student": recording()}
    start = state.create({"student": params["student"]}, rules, ("student",))
    frozen = {name: tree for name, tree in params.items() if name != "student"}

    def gradients(accumulate):
        options = dict(target="reference", text="caption", ema=0.9, skip_norm=1e9, accumulate=accumulate)
        step = jax.jit(steps.student_flow_step(modules, rules, **options))
        return lambda batch, rng: step(start, frozen, batch, rng)[0].optimizer["student"].gradients

    samples = {name: x for name, x in batch.items() if x.shape[0] == 4}
    keys = jax.random.split(jax.random.key(3), 4)
    alone = gradients(1)
    one_by_one = [alone({k: x[i::2] for k, x in samples.items()}, keys[i]) for i in (0, 1)]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *one_by_one)
    found = gradients(2)(samples, jax.random.key(3))
    difference = jax.tree.map(jnp.subtract, found, expected)
    assert optax.tree.norm(difference) <= 1e-5 * optax.tree.norm(expected)
