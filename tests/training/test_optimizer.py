"""Optimizers against optax and the PyTorch release, the guard on bad gradients, schedules and averages."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from npedit_jax.training import optimizer, state

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "G"


def _params() -> dict[str, jax.Array]:
    return {
        "kernel": jax.random.normal(jax.random.key(0), (3, 8, 5)),
        "bias": jax.random.normal(jax.random.key(1), (5,)),
        "scale": jax.random.normal(jax.random.key(2), (3, 5)),  # of stacked layers
    }


def _gradients(step: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda p: jax.random.normal(jax.random.key(10 + step), p.shape), _params())


def _scaled(factor: float, gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda g: factor * g, gradients)


def _run(
    rule: optax.GradientTransformation,
    steps: int = 5,
    gradients: Callable[[int], dict[str, jax.Array]] = _gradients,
) -> dict[str, jax.Array]:
    params = _params()
    state = rule.init(params)
    for step in range(steps):
        updates, state = rule.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_adam_without_first_moment_equals_optax(size):
    """Also for gradients so small that it matters where epsilon stands."""
    small = lambda step: _scaled(size, _gradients(step))  # noqa: E731
    ours = _run(optimizer.build("adam", learning_rate=1e-2, b1=0.0, b2=0.9), gradients=small)
    theirs = _run(optax.adam(1e-2, b1=0.0, b2=0.9), gradients=small)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)


def test_adam_without_first_moment_stores_none():
    params = _params()
    state = optimizer.build("adam", learning_rate=1e-2, b1=0.0, b2=0.9).init(params)
    stored = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert stored <= sum(leaf.size for leaf in jax.tree.leaves(params)) + 4


def test_adamw_equals_optax_and_decays_no_vector():
    ours = _run(optimizer.build("adam", learning_rate=1e-2, b1=0.9, b2=0.99, weight_decay=0.01))
    matrices = {name: name == "kernel" for name in _params()}
    theirs = _run(optax.adamw(1e-2, b1=0.9, b2=0.99, weight_decay=0.01, mask=matrices))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_clipped_adam_equals_the_release():
    """Parameters after each of three steps, from the gradients of its three cases, all above the clip."""
    found, expected = load_file(GOLDEN / "golden.safetensors"), load_file(GOLDEN / "optimizer.safetensors")
    weights = load_file(GOLDEN / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    names = sorted({key.partition(".opt.")[2] for key in expected})
    rule = optimizer.build("adam", learning_rate=2e-5, b1=0.0, b2=0.9, clip_norm=2.0)
    params = {name: jnp.asarray(weights[name], jnp.float32) for name in names} | {"others": jnp.zeros(1)}
    rule_state = rule.init(params)
    for case in ("u1", "u2", "u2nothing"):
        gradients = {name: jnp.asarray(found[f"{case}.total.grad.{name}"]) for name in names}
        whole = np.linalg.norm(found[f"{case}.total.grad_norms"])
        others = np.sqrt(whole**2 - sum(np.linalg.norm(g) ** 2 for g in gradients.values()))
        updates, rule_state = rule.update(gradients | {"others": jnp.full(1, others)}, rule_state, params)
        params = optax.apply_updates(params, updates)
        for name in names:
            # The largest weights, of 1.4, are rounded to 1e-7; a step is 2e-5.
            np.testing.assert_allclose(params[name], expected[f"{case}.opt.{name}"], rtol=1.5e-7, atol=2e-8)


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_gradients_are_clipped_to_their_global_norm(name):
    """The first is below the limit, the others above it by more and more."""
    rule = lambda clip_norm: optimizer.build(name, learning_rate=1e-2, b1=0.9, b2=0.99, clip_norm=clip_norm)  # noqa: E731
    growing = lambda step: _scaled((0.01, 1.0, 3.0)[step], _gradients(step))  # noqa: E731
    clipped = lambda step: _scaled(min(1.0, 2.0 / optax.tree.norm(growing(step))), growing(step))  # noqa: E731
    expected, found = _run(rule(0.0), 3, clipped), _run(rule(2.0), 3, growing)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_frozen_parameters_do_not_decay_and_do_not_count_in_the_norm():
    rule = optimizer.build("adam", learning_rate=1e-2, b1=0.0, b2=0.9, weight_decay=0.1)
    start = state.create({"student": _params()}, {"student": rule}, ())
    huge = _gradients(0) | {"kernel": jnp.full((3, 8, 5), 1e6)}
    end, metrics = state.apply_gradients(start, "student", huge, rule, skip_norm=300.0, frozen=("kernel",))
    np.testing.assert_array_equal(end.params["student"]["kernel"], _params()["kernel"])
    assert float(jnp.abs(end.params["student"]["bias"] - _params()["bias"]).min()) > 0
    np.testing.assert_allclose(
        metrics["gradient_norm/student"], np.hypot(*(jnp.linalg.norm(huge[name]) for name in ("bias", "scale"))), 1e-6
    )


def test_muon_treats_stacked_layers_one_by_one():
    rule = lambda: optimizer.build("muon", learning_rate=1e-2, b1=0.9, b2=0.99)  # noqa: E731
    stacked, params, gradients = _run(rule(), 1), _params(), _gradients(0)
    for layer in range(3):
        single = {"kernel": params["kernel"][layer]}
        updates, _ = rule().update({"kernel": gradients["kernel"][layer]}, rule().init(single), single)
        expected = optax.apply_updates(single, updates)["kernel"]
        np.testing.assert_allclose(stacked["kernel"][layer], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate", [1e-2, optax.linear_schedule(1e-2, 0.0, 10)])
def test_what_muon_leaves_to_adam_can_have_a_rate_of_its_own(rate):
    alike, slower = (
        _run(optimizer.build("muon", learning_rate=rate, b1=0.9, b2=0.99, adam_factor=factor), 3) for factor in (1, 0.5)
    )
    start = _params()
    np.testing.assert_array_equal(alike["kernel"], slower["kernel"])
    np.testing.assert_allclose(alike["bias"] - start["bias"], 2 * (slower["bias"] - start["bias"]), rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_bad_gradients_change_nothing_and_are_told(bad):
    rule = optimizer.build("adam", learning_rate=1e-2, b1=0.9, b2=0.99)
    params = _params()
    state = rule.init(params)
    gradients = _gradients(0)
    gradients["bias"] = gradients["bias"].at[2].set(bad)
    update = optimizer.guarded_update(rule, params, state, gradients, skip_norm=300.0)
    assert bool(update.skipped)
    jax.tree.map(np.testing.assert_array_equal, (update.params, update.optimizer), (params, state))


def test_good_gradients_pass_the_guard():
    rule = optimizer.build("adam", learning_rate=1e-2, b1=0.9, b2=0.99)
    params = _params()
    update = optimizer.guarded_update(rule, params, rule.init(params), _gradients(0), skip_norm=300.0)
    assert not bool(update.skipped)
    np.testing.assert_allclose(update.norm, optax.global_norm(_gradients(0)), rtol=1e-6)
    assert float(jnp.abs(update.params["bias"] - params["bias"]).max()) > 0


def test_schedule_warms_up_peaks_and_ends():
    rate = optimizer.schedule(1.0, 0.1, 10, 110)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110)], [0.0, 0.5, 1.0, 0.55, 0.1], atol=1e-6)
    assert optimizer.schedule(0.0, 0.0, 0, 10)(5) == 0.0


def test_average_forgets_the_start_quickly_and_then_decays_as_told():
    ema = optimizer.ema_update({"a": jnp.zeros(())}, {"a": jnp.ones(())}, 0.999, jnp.asarray(0))
    np.testing.assert_allclose(ema["a"], 0.9, rtol=1e-6)
    ema = optimizer.ema_update({"a": jnp.zeros(())}, {"a": jnp.ones(())}, 0.999, jnp.asarray(10**6))
    np.testing.assert_allclose(ema["a"], 0.001, rtol=1e-3)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        optimizer.build("sgd", learning_rate=1.0, b1=0.0, b2=0.0)
