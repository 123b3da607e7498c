"""Distribution matching distillation (DMD): what pulls the student's pictures onto the image manifold.

Source: DMD2 (arXiv 2405.14867), in the form of NP-Edit (arXiv 2510.14978, section 3).
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
    if normalizer not in NORMALIZERS:
        raise ValueError(f"unknown DMD normalizer {normalizer!r}; choose one of {NORMALIZERS}")
    x0 = x0.astype(jnp.float32)
    fixed, real_x0, fake_x0 = jax.lax.stop_gradient((x0, real_x0.astype(jnp.float32), fake_x0.astype(jnp.float32)))
    axes = (-1,) if normalizer == "pixel" else tuple(range(1, x0.ndim))
    weight = jnp.maximum(jnp.mean(jnp.abs(fixed - real_x0), axis=axes, keepdims=True), floor)
    gradient = ((fixed - real_x0) - (fixed - fake_x0)) / weight
    target = fixed - gradient
    return 0.5 * jnp.mean(jnp.square(x0 - target), axis=tuple(range(1, x0.ndim)))
