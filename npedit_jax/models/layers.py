"""Pieces that every network shares: RMS norm, attention by name, rematerialised and stacked blocks."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from npedit_jax.models import chunked_attention

# What the backward pass may keep of a block's forward pass instead of computing it again, by the name used in configs.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 and returned in `dtype`.

    Source: `transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm`, `diffusers.models.normalization.RMSNorm`.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + self.epsilon)
        return (x * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(self.dtype)


def attention(
    q_BSKA: jax.Array,
    k_BTGA: jax.Array,
    v_BTGA: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention; K query heads share G key/value heads where G divides K. Softmax in float32.

    Args:
      mask: bool, True where a query may look, broadcastable to [B, K, S, T]; None lets every query see every key.
      implementation: "xla" or "cudnn" (`jax.nn.dot_product_attention`), or "chunked": for long sequences on a CPU, and
        masks that are the same for all heads (`chunked_attention`).

    Returns:
      [B, S, K, A] in the dtype of `q_BSKA`. A query whose mask is False everywhere gets a uniform average: finite.
    """
    if implementation == "chunked":
        return chunked_attention.attention(q_BSKA, k_BTGA, v_BTGA, mask)
    return jax.nn.dot_product_attention(q_BSKA, k_BTGA, v_BTGA, mask=mask, implementation=implementation)


def remat(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Returns `block` rematerialised under the policy of that name ("none" returns it as it is).

    Raises:
      ValueError: the policy has no such name.
    """
    if policy == "none":
        return block
    if policy not in REMAT_POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}; choose one of {['none', *REMAT_POLICIES]}")
    # Inside nn.scan XLA cannot merge the recomputation with the original, so the barrier against that is left out.
    return nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=False)


def stack(block: type[nn.Module], layers: int, policy: str, broadcast_arguments: int) -> type[nn.Module]:
    """Turns `block` into `layers` copies under one scan, with parameters stacked along a leading layer axis.

    `block.__call__(carry, *arguments)` must return `(carry, None)`; its `broadcast_arguments` further arguments are the
    same for every layer.
    """
    scan = functools.partial(
        nn.scan,
        variable_axes={"params": 0, "lora": 0},  # adapters are stacked like the parameters they lie on
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * broadcast_arguments,
        length=layers,
    )
    return scan(remat(block, policy))
