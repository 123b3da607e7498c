"""The scorer's loss against its definition, question weights, the two forms and the temperature schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.objectives import feedback


def test_yes_no_is_the_softmax_cross_entropy_of_the_answers():
    logits = jnp.array([[[1.0, 2.0], [0.5, -0.5]]])
    loss = feedback.answer_loss(logits, jnp.zeros((1, 2)), jnp.array([[1, 0]]), jnp.ones((1, 2)), scale=0.5)
    expected = -np.mean([jax.nn.log_softmax(logits[0, 0] * 0.5)[1], jax.nn.log_softmax(logits[0, 1] * 0.5)[0]])
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_vocabulary_form_normalises_over_every_token_and_has_no_temperature():
    full = jax.random.normal(jax.random.key(0), (11,))
    logits = full[jnp.array([3, 7])][None, None]
    lse = jax.nn.logsumexp(full)[None, None]
    for scale in (1.0, 0.1):
        loss = feedback.answer_loss(logits, lse, jnp.ones((1, 1)), jnp.ones((1, 1)), form="vocabulary", scale=scale)
        np.testing.assert_allclose(loss[0], -jax.nn.log_softmax(full)[7], rtol=1e-6)


def test_question_weights_leave_questions_out():
    logits = jax.random.normal(jax.random.key(0), (2, 2, 2))
    answer, lse = jnp.ones((2, 2)), jnp.zeros((2, 2))
    both = feedback.answer_loss(logits, lse, answer, jnp.array([[0.0, 1.0], [0.0, 0.0]]))
    second = feedback.answer_loss(logits[:1, 1:], lse[:1, 1:], answer[:1, 1:], jnp.ones((1, 1)))
    np.testing.assert_allclose(both, [float(second[0]), 0.0], rtol=1e-6)


def test_soft_answers_are_best_at_their_own_probability():
    loss = lambda z: feedback.answer_loss(  # noqa: E731
        jnp.stack([jnp.zeros_like(z), z])[None, None], jnp.zeros((1, 1)), jnp.full((1, 1), 0.25), jnp.ones((1, 1))
    )[0]
    assert abs(float(jax.grad(loss)(jnp.log(1.0 / 3.0)))) < 1e-6


def test_temperature_rises_and_stays():
    values = [float(feedback.temperature(jnp.asarray(step), 0.1, 1.0, 2000)) for step in (0, 306, 2000, 9000)]
    np.testing.assert_allclose(values, [0.1, 0.2377, 1.0, 1.0], rtol=1e-5)
    assert float(feedback.temperature(jnp.asarray(0), 0.1, 1.0, 0)) == 1.0  # no schedule


def test_unknown_form():
    with pytest.raises(ValueError, match="unknown scorer loss 'mse'"):
        feedback.answer_loss(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)), form="mse")
