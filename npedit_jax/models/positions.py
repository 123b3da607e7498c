"""Where the denoiser's tokens stand: Z-Image's positions on three axes, their rotary embedding, and 2-D sinusoids.

Shape suffixes: B batch, N image tokens, L text tokens, S whole sequence, K heads, A head width, R position axes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from npedit_jax import flops

Rotation = tuple[jax.Array, jax.Array]
SINUSOID_PERIOD = 10000.0


def rotation(positions_BSR: jax.Array, widths: Sequence[int], lengths: Sequence[int], theta: float) -> Rotation:
    """Cosines and signed sines that `rotate` takes, each [B, S, 1, A] float32, where A is the sum of `widths`.

    The tables are built in float64, as angles near `lengths` lose digits in float32, and looked up by position.

    Args:
      positions_BSR: integer position on each of R axes; axis r must stay below `lengths[r]`.
      widths: channels of a head that turn with each axis, all even.
      theta: base of the frequencies.

    Source: `diffusers.models.transformers.transformer_z_image.RopeEmbedder`.
    """
    cosines, sines = [], []
    for axis, (width, length) in enumerate(zip(widths, lengths, strict=True)):
        frequency = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angle = np.repeat(np.outer(np.arange(length), frequency).astype(np.float32), 2, axis=-1)
        # Of a pair (a, b) the first turns to a cos - b sin, the second to b cos + a sin.
        sign = np.tile(np.array([-1.0, 1.0], np.float32), width // 2)
        cosines.append(jnp.asarray(np.cos(angle))[positions_BSR[..., axis]])
        sines.append(jnp.asarray(sign * np.sin(angle))[positions_BSR[..., axis]])
    return jnp.concatenate(cosines, axis=-1)[:, :, None], jnp.concatenate(sines, axis=-1)[:, :, None]


def rotate(x_BSKA: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the pairs (2i, 2i + 1) of each head by the angles of `rotation`; computed and returned in float32."""
    cosine_BS1A, sine_BS1A = rotation
    return x_BSKA.astype(jnp.float32) * cosine_BS1A + swap(x_BSKA).astype(jnp.float32) * sine_BS1A


def swap(x: jax.Array) -> jax.Array:
    """Lets neighbours 2i and 2i + 1 of the last axis change places.

    A product with a matrix of zeros and ones, exact at full precision: on TPU it costs half a percent of a layer, while
    slices and rolls inside a tile are written out, as float32 more than all else in the attention of a long sequence.
    """
    places = np.eye(x.shape[-1])[np.arange(x.shape[-1]) ^ 1]
    with jax.named_scope(flops.REORDERING):
        return jnp.matmul(x, jnp.asarray(places, x.dtype), precision=jax.lax.Precision.HIGHEST)


def joint_positions(grid: tuple[int, int, int], sizes: tuple[int, int], padded_B: jax.Array) -> jax.Array:
    """Rotary positions (frame, row, column) of image tokens, image pads and caption tokens, [B, S, 3] int32.

    The caption counts up on the frame axis from 1, pads included; the frames come right after it. Image pads stand at
    (0, 0, 0).

    Args:
      grid: frames, rows and columns of patches.
      sizes: number of image tokens with pads, and of text slots.
      padded_B: padded caption length of each sample.
    """
    tokens = np.prod(grid)
    positions_S3 = np.zeros((sum(sizes), 3), np.int32)
    positions_S3[:tokens] = np.indices(grid).reshape(3, -1).T
    positions_S3[sizes[0] :, 0] = np.arange(1, sizes[1] + 1)
    after_caption_S3 = np.zeros_like(positions_S3)
    after_caption_S3[:tokens, 0] = 1
    return positions_S3[None] + after_caption_S3[None] * (padded_B + 1)[:, None, None]


def sinusoids(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed 2-D positions of scale 1, [rows * columns, width] float32; 4 divides `width`.

    The channels are a quarter each of sin and cos of the row, sin and cos of the column.
    """
    frequency = SINUSOID_PERIOD ** (-np.arange(width // 4) / (width // 4))
    row_N, column_N = np.indices((rows, columns)).reshape(2, -1)
    angles = (np.outer(row_N, frequency), np.outer(column_N, frequency))
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=-1).astype(np.float32)
