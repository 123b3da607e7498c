"""From pictures in [-1, 1] of any size to what a vision tower was trained on, differentiably."""

import jax
import jax.numpy as jnp

# Mean and standard deviation of each colour in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def prepare(
    images: jax.Array, size: int, mean: tuple[float, ...] = IMAGENET[0], deviation: tuple[float, ...] = IMAGENET[1]
) -> jax.Array:
    """Clamps, normalises and resizes pictures to a square, in this order and in float32.

    Args:
      images: [..., H, W, 3], pixels in [-1, 1]; values outside are clamped and get no gradient.
      size: side of the result; a picture of that size is not resampled.
      mean: of each colour, in [0, 1].
      deviation: standard deviation of each colour.

    Returns:
      [..., size, size, 3] float32, by a cubic kernel (a = -0.5), antialiased where it shrinks.
    """
    unit = jnp.clip((images.astype(jnp.float32) + 1.0) * 0.5, 0.0, 1.0)
    shape = (1,) * (images.ndim - 1) + (-1,)
    normal = (unit - jnp.asarray(mean, jnp.float32).reshape(shape)) / jnp.asarray(deviation, jnp.float32).reshape(shape)
    return jax.image.resize(normal, (*images.shape[:-3], size, size, images.shape[-1]), "cubic", antialias=True)
