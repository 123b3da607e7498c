"""Distribution matching distillation (DMD): what pulls the student's pictures onto the image manifold.

Source: DMD2 (arXiv 2405.14867), in the form of NP-Edit (arXiv 2510.14978, section 3); its two parts apart after
Decoupled DMD (arXiv 2511.22677).
"""

import jax
import jax.numpy as jnp

NORMALIZERS = ("pixel", "sample")


def guide(v_positive: jax.Array, v_negative: jax.Array, scale_B: jax.Array) -> jax.Array:
    """Classifier-free guidance, one scale per sample: `v_negative + scale (v_positive - v_negative)`."""
    scale = scale_B.reshape(scale_B.shape + (1,) * (v_positive.ndim - 1))
    return v_negative + scale * (v_positive - v_negative)


def matching_loss(
    x0: jax.Array, real_x0: jax.Array, fake_x0: jax.Array, *, normalizer: str = "pixel", floor: float = 1e-8
) -> jax.Array:
    """DMD loss [B]: its gradient with respect to `x0` is the normalised difference of the two scores.

    Args:
      x0: the student's latents [B, H, W, C]; the only input that gets a gradient.
      real_x0: what the (guided) real score predicts from the noised x0.
      fake_x0: what the fake score predicts from the same noised x0.
      normalizer: |x0 - real_x0| is averaged over channels ("pixel": one weight per latent pixel, as the PyTorch release
        of NP-Edit does) or over all axes but the batch ("sample": as in DMD's paper).
      floor: lower bound of that weight.

    Raises:
      ValueError: unknown normalizer.
    """
    x0 = x0.astype(jnp.float32)
    fixed, real_x0, fake_x0 = _fixed(x0, real_x0, fake_x0)
    difference = (fixed - real_x0) - (fixed - fake_x0)
    return _pull(x0, difference / _weight(fixed, real_x0, normalizer, floor))


def decoupled_loss(
    x0: jax.Array,
    real_x0: jax.Array,
    fake_x0: jax.Array,
    guidance: jax.Array,
    *,
    matching_weight: float = 1.0,
    guidance_weight: float = 1.0,
    normalizer: str = "pixel",
    floor: float = 1e-8,
) -> jax.Array:
    """DMD loss [B] with the two parts of its gradient apart, each with a time, a noise and a weight of its own.

    The gradient is `(matching_weight (fake_x0 - real_x0) - guidance_weight guidance) / w`: the first part matches the
    distributions (the regulariser), the second does the distilling (the engine). With one time, one noise and weights
    of 1 this is `matching_loss` with the guided real score.

    Args:
      x0: as in `matching_loss`.
      real_x0: what the real score predicts without guidance, from x0 noised to the matching part's time.
      fake_x0: what the fake score predicts from the same.
      guidance: `(scale - 1) (positive - negative)`, the difference that guidance makes to the real score's prediction
        from x0 noised to the guidance part's time.
      normalizer, floor: as in `matching_loss`; the weight w is that of the guided prediction, and neither
        `matching_weight` nor `guidance_weight` changes it.

    Raises:
      ValueError: unknown normalizer.
    """
    x0 = x0.astype(jnp.float32)
    fixed, real_x0, fake_x0, guidance = _fixed(x0, real_x0, fake_x0, guidance)
    difference = matching_weight * (fake_x0 - real_x0) - guidance_weight * guidance
    return _pull(x0, difference / _weight(fixed, real_x0 + guidance, normalizer, floor))


def _fixed(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return jax.lax.stop_gradient(tuple(x.astype(jnp.float32) for x in arrays))


def _weight(x0: jax.Array, real_x0: jax.Array, normalizer: str, floor: float) -> jax.Array:
    if normalizer not in NORMALIZERS:
        raise ValueError(f"unknown DMD normalizer {normalizer!r}; choose one of {NORMALIZERS}")
    axes = (-1,) if normalizer == "pixel" else tuple(range(1, x0.ndim))
    return jnp.maximum(jnp.mean(jnp.abs(x0 - real_x0), axis=axes, keepdims=True), floor)


def _pull(x0: jax.Array, gradient: jax.Array) -> jax.Array:
    """A loss [B] whose gradient in `x0` is the given one, divided by the number of elements of a sample."""
    target = jax.lax.stop_gradient(x0) - gradient
    return 0.5 * jnp.mean(jnp.square(x0 - target), axis=tuple(range(1, x0.ndim)))
