"""Between images as files hold them (uint8, 0 to 255) and as networks see them (float32 in [-1, 1])."""

import jax
import jax.numpy as jnp


def to_pixels(image: jax.Array) -> jax.Array:
    """uint8 images to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Float pixels in [-1, 1], clipped and rounded, as uint8."""
    return jnp.rint((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
