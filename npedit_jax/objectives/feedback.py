"""The scorer's loss: cross-entropy of its Yes/No answers about the student's pictures."""

import jax
import jax.numpy as jnp

FORMS = ("yes_no", "vocabulary")


def temperature(step: jax.Array, start: float, end: float, steps: int) -> jax.Array:
    """Factor on the logits: rises linearly from `start` to `end` over the first `steps` steps (0: none), then stays.

    A small factor flattens the answers while the student's pictures are still far from the scorer's data.
    """
    return start + (end - start) * jnp.minimum(1.0, step / steps) if steps else jnp.asarray(end, jnp.float32)


def answer_loss(
    logits_BQ2: jax.Array,
    logsumexp_BQ: jax.Array,
    answer_BQ: jax.Array,
    weight_BQ: jax.Array,
    *,
    scale: jax.Array | float = 1.0,
    form: str = "yes_no",
) -> jax.Array:
    """Cross-entropy of the wanted answers, averaged over each sample's questions: [B], float32.

    Args:
      logits_BQ2: logits of (No, Yes) at the answer's place.
      logsumexp_BQ: logsumexp over the whole vocabulary there (used by "vocabulary" only).
      answer_BQ: wanted probability of Yes in [0, 1]; 0 and 1 for a definite answer.
      weight_BQ: weight of each question; a sample whose weights are all 0 has loss 0.
      scale: factor on the logits (the temperature schedule); "vocabulary" has none.
      form: "yes_no" normalises over the two answers; "vocabulary" over every token.

    Raises:
      ValueError: unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"unknown scorer loss {form!r}; choose one of {FORMS}")
    logits = logits_BQ2.astype(jnp.float32) * scale
    if form == "yes_no":
        normalizer_BQ = jax.nn.logsumexp(logits, axis=-1)
    else:
        # A factor on every logit cannot be applied after the sum over the vocabulary: this form has no temperature.
        logits, normalizer_BQ = logits_BQ2.astype(jnp.float32), logsumexp_BQ
    log_no, log_yes = logits[..., 0] - normalizer_BQ, logits[..., 1] - normalizer_BQ
    answer_BQ = answer_BQ.astype(jnp.float32)
    loss_BQ = -(answer_BQ * log_yes + (1.0 - answer_BQ) * log_no)
    return jnp.sum(loss_BQ * weight_BQ, axis=-1) / jnp.maximum(jnp.sum(weight_BQ, axis=-1), 1e-6)


def right_probability(logits_BQ2: jax.Array, answer_BQ: jax.Array) -> jax.Array:
    """The probability over (No, Yes) of the wanted answer, 1 for Yes and 0 for No: [B, Q] in [0, 1]."""
    yes_BQ = yes_probability(logits_BQ2)
    return jnp.where(answer_BQ > 0.5, yes_BQ, 1.0 - yes_BQ)


def yes_probability(logits_BQ2: jax.Array) -> jax.Array:
    """P(Yes) over the two answers, [B, Q] in [0, 1]."""
    return jax.nn.softmax(logits_BQ2.astype(jnp.float32), axis=-1)[..., 1]
