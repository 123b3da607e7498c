"""Gradient accumulation: a batch goes through a gradient in parts, one after the other, in the memory of one part.

Shapes: B samples of the batch, N parts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from npedit_jax import parallel


def mean(
    function: Callable[[Any, jax.Array], Any], samples: Any, weight_B: jax.Array | None, rng: jax.Array, parts: int
) -> Any:
    """What `function` gives for the whole batch, where that is the mean over its samples by their weight.

    Args:
      function: `(samples, rng) -> tree` of such means: losses, gradients, metrics.
      samples: tree of [B, ...].
      weight_B: of each sample; not read for one part.
      rng: given to the only part; of several each has a key of its own.
      parts: N.

    Raises:
      ValueError: the parts are not equal.
    """
    if parts == 1:
        return function(samples, rng)
    if weight_B.shape[0] % parts:
        raise ValueError(
            f"a batch of {weight_B.shape[0]} cannot be cut into {parts} equal parts; change batch_size or accumulate"
        )
    cut = jax.tree.map(lambda x: _cut(x, parts), samples)
    share_N = jnp.sum(_cut(weight_B, parts), axis=1) / jnp.maximum(jnp.sum(weight_B), 1e-6)

    def add(total: Any, item: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, None]:
        part, rng, share = item
        return jax.tree.map(lambda so_far, x: so_far + share * x, total, function(part, rng)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], cut), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (cut, jax.random.split(rng, parts), share_N))[0]


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [N, B / N, ...]. Neighbours go to different parts, so that each device has samples in every one."""
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return parallel.constrain(x, None, parallel.BATCH, *(None,) * (x.ndim - 2))
