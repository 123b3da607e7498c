"""Optimizers against optax, the guard on bad gradients, schedules and averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from npedit_jax.training import optimizer


def _params() -> dict[str, jax.Array]:
    return {
        "kernel": jax.random.normal(jax.random.key(0), (3, 8, 5)),
        "bias": jax.random.normal(jax.random.key(1), (5,)),
    }


def _gradients(step: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda p: jax.random.normal(jax.random.key(10 + step), p.shape), _params())


def _run(rule: optax.GradientTransformation, steps: int = 5) -> dict[str, jax.Array]:
    params = _params()
    state = rule.init(params)
    for step in range(steps):
        updates, state = rule.update(_gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adam_without_first_moment_equals_optax():
    ours = _run(optimizer.build("adam", learning_rate=1e-2, b1=0.0, b2=0.9))
    theirs = _run(optax.adam(1e-2, b1=0.0, b2=0.9))
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


def test_average_forgets_the_start_quickly_and_then_decays_as_told():
    ema = optimizer.ema_update({"a": jnp.zeros(())}, {"a": jnp.ones(())}, 0.999, jnp.asarray(0))
    np.testing.assert_allclose(ema["a"], 0.9, rtol=1e-6)
    ema = optimizer.ema_update({"a": jnp.zeros(())}, {"a": jnp.ones(())}, 0.999, jnp.asarray(10**6))
    np.testing.assert_allclose(ema["a"], 0.001, rtol=1e-3)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        optimizer.build("sgd", learning_rate=1.0, b1=0.0, b2=0.0)
