"""DMD's loss: its gradient is the normalised difference of scores, and nothing else carries one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.objectives import matching

SHAPE = (3, 4, 6, 2)


def _inputs() -> tuple[jax.Array, ...]:
    return tuple(jax.random.normal(jax.random.key(i), SHAPE) for i in range(3))


@pytest.mark.parametrize(("normalizer", "axes"), [("pixel", (-1,)), ("sample", (1, 2, 3))])
def test_gradient_is_the_normalised_score_difference(normalizer, axes):
    x0, real, fake = _inputs()
    loss = lambda x: jnp.sum(matching.matching_loss(x, real, fake, normalizer=normalizer))  # noqa: E731
    weight = jnp.mean(jnp.abs(x0 - real), axis=axes, keepdims=True)
    expected = (fake - real) / weight / np.prod(SHAPE[1:])
    np.testing.assert_allclose(jax.grad(loss)(x0), expected, rtol=1e-4, atol=1e-6)


def test_scores_get_no_gradient():
    x0, real, fake = _inputs()
    gradients = jax.grad(lambda r, f: jnp.sum(matching.matching_loss(x0, r, f)), argnums=(0, 1))(real, fake)
    assert all(float(jnp.abs(g).max()) == 0.0 for g in gradients)


def test_loss_is_finite_where_the_score_agrees_exactly():
    x0, _, fake = _inputs()
    assert np.isfinite(matching.matching_loss(x0, x0, x0)).all()
    assert np.isfinite(jax.grad(lambda x: jnp.sum(matching.matching_loss(x, x0, fake)))(x0)).all()


def test_guidance_is_per_sample():
    positive, negative, _ = _inputs()
    guided = matching.guide(positive, negative, jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(guided[0], negative[0], atol=1e-6)
    np.testing.assert_allclose(guided[1], positive[1], atol=1e-6)
    np.testing.assert_allclose(guided[2], negative[2] + 3 * (positive[2] - negative[2]), atol=1e-5)


def test_unknown_normalizer():
    with pytest.raises(ValueError, match="unknown DMD normalizer 'batch'"):
        matching.matching_loss(*_inputs(), normalizer="batch")


@pytest.mark.parametrize("normalizer", matching.NORMALIZERS)
def test_decoupled_loss_at_one_time_and_weights_of_one_is_the_usual(normalizer):
    x0, positive, fake = _inputs()
    negative = jax.random.normal(jax.random.key(9), SHAPE)
    scale = jnp.array([1.0, 3.5, 7.5])
    guided = matching.guide(positive, negative, scale)
    difference = (scale - 1.0)[:, None, None, None] * (positive - negative)
    usual = lambda x: matching.matching_loss(x, guided, fake, normalizer=normalizer)  # noqa: E731
    apart = lambda x: matching.decoupled_loss(x, positive, fake, difference, normalizer=normalizer)  # noqa: E731
    np.testing.assert_allclose(apart(x0), usual(x0), rtol=1e-4)
    expected = jax.grad(lambda x: jnp.sum(usual(x)))(x0)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(apart(x)))(x0), expected, rtol=1e-4, atol=1e-6)


def test_each_part_of_the_decoupled_loss_alone():
    x0, positive, fake = _inputs()
    difference = jax.random.normal(jax.random.key(9), SHAPE)

    def gradient(**weights):
        return jax.grad(lambda x: jnp.sum(matching.decoupled_loss(x, positive, fake, difference, **weights)))(x0)

    weight = jnp.mean(jnp.abs(x0 - positive - difference), axis=-1, keepdims=True) * np.prod(SHAPE[1:])
    matched, guided = gradient(guidance_weight=0.0), gradient(matching_weight=0.0)
    np.testing.assert_allclose(matched, (fake - positive) / weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(guided, -difference / weight, rtol=1e-4, atol=1e-6)
    both = gradient(matching_weight=0.5, guidance_weight=2.0)
    np.testing.assert_allclose(both, 0.5 * matched + 2.0 * guided, rtol=1e-4, atol=1e-6)


def test_only_x0_of_the_decoupled_loss_gets_a_gradient():
    x0, positive, fake = _inputs()
    loss = lambda *scores: jnp.sum(matching.decoupled_loss(x0, *scores))  # noqa: E731
    gradients = jax.grad(loss, argnums=(0, 1, 2))(positive, fake, positive - fake)
    assert all(float(jnp.abs(g).max()) == 0.0 for g in gradients)
