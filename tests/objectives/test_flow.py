"""The flow's algebra: noising and its inverses, time shift, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.objectives import flow


def _latents(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (3, 4, 6, 2))


def test_velocity_leads_back_to_both_ends():
    x0, noise = _latents(0), _latents(1)
    t = jnp.array([0.1, 0.5, 0.9])
    x_t = flow.add_noise(x0, noise, t)
    np.testing.assert_allclose(flow.clean_from_velocity(x_t, noise - x0, t), x0, atol=1e-6)
    np.testing.assert_allclose(flow.noise_from_velocity(x_t, noise - x0, t), noise, atol=1e-6)


def test_noising_ends_at_the_image_and_at_the_noise():
    x0, noise = _latents(0), _latents(1)
    np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.zeros(3)), x0)
    np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.ones(3)), noise)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_shift_keeps_the_ends_and_the_order(shift):
    t = jnp.linspace(0.0, 1.0, 11)
    shifted = flow.shift_time(t, shift)
    assert shifted[0] == 0.0 and shifted[-1] == 1.0
    assert np.all(np.diff(shifted) > 0)
    np.testing.assert_allclose(shifted[5], shift * 0.5 / (1 + (shift - 1) * 0.5), rtol=1e-6)


def test_logit_normal_weight_is_a_density():
    t = (np.arange(20000) + 0.5) / 20000
    assert abs(float(jnp.mean(flow.logit_normal_weight(jnp.asarray(t)))) - 1.0) < 1e-3


def test_endpoint_share():
    t = flow.with_endpoint(jax.random.key(0), jnp.full(20000, 0.5), 0.3)
    assert abs(float(jnp.mean(t == 1.0)) - 0.3) < 0.02


def test_velocity_loss_is_per_sample_and_zero_at_the_truth():
    x0, noise = _latents(0), _latents(1)
    velocity = (noise - x0).at[1].add(2.0)
    np.testing.assert_allclose(flow.velocity_loss(velocity, x0, noise), [0.0, 4.0, 0.0], atol=1e-5)


def test_clean_weight_makes_the_velocity_error_that_of_x0():
    x0, noise, velocity = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 2))
    t = jnp.array([0.2, 0.9])
    x_t = flow.add_noise(x0, noise, t)
    error = jnp.mean(jnp.square(flow.clean_from_velocity(x_t, velocity, t) - x0), axis=(1, 2, 3))
    weighted = flow.velocity_loss(velocity, x0, noise) * flow.LOSS_WEIGHTS["clean"](t)
    np.testing.assert_allclose(weighted, error, rtol=1e-5)
