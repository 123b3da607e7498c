"""Images of any resolution as LLaVA-OneVision sees them: which tiles, and how their tokens become rows of the table.

Source: `transformers.image_processing_utils.select_best_resolution`,
`transformers.models.llava_onevision.modeling_llava_onevision.LlavaOnevisionModel.pack_image_features`.
Shape suffixes: T tiles of an image, N tokens of a tile, H rows and W columns of tokens, D model width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# Beyond this ratio of the token grid's side to the side that `max_tiles` tiles have, it is resampled to the latter.
RESAMPLE_ABOVE = 1.1


def best_resolution(image_size: tuple[int, int], resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Returns the resolution (height, width) that keeps most of the picture's pixels, and of those wastes the least.

    Raises:
      ValueError: no resolutions to choose from.
    """
    if not resolutions:
        raise ValueError("no resolutions to choose from; give the scorer's projector the resolutions of its config")
    height, width = image_size

    def fit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=fit)


def tile_grid(image_size: tuple[int, int], resolutions: tuple[tuple[int, int], ...], tile_size: int) -> tuple[int, int]:
    """Returns the rows and columns of tiles that a picture of that size is cut into, the whole picture not counted."""
    height, width = best_resolution(image_size, resolutions)
    return height // tile_size, width // tile_size


def unpad(grid_HWD: jax.Array, image_size: tuple[int, int]) -> jax.Array:
    """Cuts off the margins that padding to the tiles' aspect ratio had added around a picture of that size."""
    height, width, _ = grid_HWD.shape
    image_height, image_width = image_size
    if image_width / image_height > width / height:
        margin = (height - int(round(image_height * (width / image_width), 7))) // 2
        return grid_HWD[margin : height - margin]
    margin = (width - int(round(image_width * (height / image_height), 7))) // 2
    return grid_HWD[:, margin : width - margin]


def linear_weights(size: int, new_size: int) -> np.ndarray:
    """Matrix [new_size, size] of linear interpolation between pixel centres, not antialiased, edges repeated."""
    center = np.maximum((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0.0)
    first = np.minimum(np.floor(center).astype(int), size - 1)
    second = np.minimum(first + 1, size - 1)
    weights = np.zeros((new_size, size))
    np.add.at(weights, (np.arange(new_size), first), 1.0 - (center - first))
    np.add.at(weights, (np.arange(new_size), second), center - first)
    return weights.astype(np.float32)


def pack(
    tokens_TND: jax.Array, newline_D: jax.Array, image_size: tuple[int, int], grid: tuple[int, int], max_tiles: int
) -> jax.Array:
    """Rows of the image table for one tiled picture: [rows, D].

    The whole picture's tokens come first; then those of the tiles put together, without padding, resampled where they
    are too many, and a newline row after each line of them.

    Args:
      tokens_TND: projected tokens of each tile, tile 0 being the whole picture.
      newline_D: the learned row.
      image_size: height and width of the original picture in pixels.
      grid: rows and columns of tiles.
      max_tiles: how many tiles' tokens to keep at most, about.

    Raises:
      ValueError: the number of tiles is not what the picture's size asks for.
    """
    rows, columns = grid
    tiles, patches, width = tokens_TND.shape
    if tiles != 1 + rows * columns:
        raise ValueError(
            f"a picture of {image_size[0]}x{image_size[1]} is cut into {rows}x{columns} tiles and seen whole, "
            f"{1 + rows * columns} tiles in all; found {tiles}"
        )
    side = math.isqrt(patches)
    x = tokens_TND[1:].reshape(rows, columns, side, side, width).transpose(0, 2, 1, 3, 4)
    x = unpad(x.reshape(rows * side, columns * side, width), image_size)
    ratio = math.sqrt(x.shape[0] * x.shape[1] / (max_tiles * patches))
    if ratio > RESAMPLE_ABOVE:
        vertical = linear_weights(x.shape[0], int(x.shape[0] // ratio))
        horizontal = linear_weights(x.shape[1], int(x.shape[1] // ratio))
        x = jnp.einsum("yh,xw,hwd->yxd", vertical, horizontal, x.astype(jnp.float32)).astype(tokens_TND.dtype)
    newlines = jnp.broadcast_to(newline_D, (x.shape[0], 1, width))
    x = jnp.concatenate([x, newlines], axis=1).reshape(-1, width)
    return jnp.concatenate([tokens_TND[0], x])
