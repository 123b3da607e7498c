"""The few-step sampler: exact networks, where each sampler ends, gradients through both steps, bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.objectives import flow, unroll

SHAPE = (2, 4, 4, 3)


def _noises(count: int) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), SHAPE) for i in range(count)]


def _times(*values: float) -> list[jax.Array]:
    return [jnp.full(SHAPE[:1], value) for value in values]


@pytest.mark.parametrize("sampler", unroll.SAMPLERS)
def test_a_network_that_knows_the_image_returns_it(sampler):
    target = jax.random.normal(jax.random.key(9), SHAPE)
    velocity = lambda x_t, t: (x_t - target) / flow.expand(t, x_t)  # noqa: E731
    start, *fresh = _noises(4)
    x0 = unroll.sample(velocity, start, _times(1.0, 0.9, 0.75, 0.5), fresh, sampler=sampler)
    np.testing.assert_allclose(x0, target, atol=1e-5)


def test_ddim_without_eta_ignores_fresh_noise_and_follows_the_line():
    seen = []

    def velocity(x_t, t):
        seen.append(x_t)
        return jnp.zeros_like(x_t)

    start, fresh = _noises(2)
    unroll.sample(velocity, start, _times(1.0, 0.5), [fresh], sampler="ddim", eta=0.0)
    # Velocity 0: x0 and the noise are both x_t, so the next x_t is x_t again, whatever was drawn.
    np.testing.assert_allclose(seen[1], start, atol=1e-6)


def test_ddim_with_eta_one_keeps_the_variance_of_the_noise():
    big = (1, 64, 64, 8)
    start, fresh = (jax.random.normal(jax.random.key(i), big) for i in range(2))
    seen = []

    def velocity(x_t, t):
        seen.append(x_t)
        return x_t / flow.expand(t, x_t)  # the image is all zeros

    unroll.sample(velocity, start, [jnp.ones(1), jnp.full(1, 0.6)], [fresh], sampler="ddim", eta=1.0)
    assert abs(float(jnp.std(seen[1])) - 0.6) < 0.01


def test_gradient_flows_through_both_steps():
    start, fresh = _noises(2)

    def loss(weights):
        first, second = weights
        velocity = lambda x_t, t: jnp.where(t[0] == 1.0, first, second) * x_t  # noqa: E731
        return jnp.mean(unroll.sample(velocity, start, _times(1.0, 0.5), [fresh]) ** 2)

    gradients = jax.grad(loss)((0.3, 0.7))
    assert all(abs(float(g)) > 1e-3 for g in gradients)


def test_bad_arguments():
    start, fresh = _noises(2)
    velocity = lambda x_t, t: x_t  # noqa: E731
    with pytest.raises(ValueError, match="unknown sampler 'euler'"):
        unroll.sample(velocity, start, _times(1.0), [], sampler="euler")
    with pytest.raises(ValueError, match="2 times need 1 fresh noises, got 0"):
        unroll.sample(velocity, start, _times(1.0, 0.5), [])
