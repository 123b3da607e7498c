"""Pieces that every network shares: RMS norm, attention by name, rematerialised and stacked blocks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from npedit_jax.models import chunked_attention, flash_attention

_policies = jax.checkpoint_policies
_NAMES = (flash_attention.NAME,)
# What the backward pass may keep of a block's forward pass instead of computing it again, by the name used in configs,
# from least memory to most.
REMAT_POLICIES = {
    "full": _policies.nothing_saveable,
    # What attention gave, in the host's memory.
    "attention_offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # What attention gave: its scores are computed once.
    "attention": _policies.save_only_these_names(*_NAMES),
    # The products with parameters.
    "dots_no_batch": _policies.dots_with_no_batch_dims_saveable,
    # Both: only what is cheap is computed again.
    "dots_attention": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(*_NAMES)
    ),
    # All products, those of attention too, as large as its scores.
    "dots": _policies.dots_saveable,
}
# Tokens. From FLASH_LENGTH on a flash kernel is worth its set-up; at LONG the scores of 30 heads would take over 2 GB a
# sample, and the plain form takes some queries at a time.
FLASH_LENGTH, LONG = 1024, 4096
IMPLEMENTATIONS = ("xla", "splash", "cudnn", "chunked")
KERNELS = {"splash": "tpu", "cudnn": "gpu"}  # those that one platform alone has


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
      implementation: "xla", the plain form; "splash" (`flash_attention`, TPU) or "cudnn" (`jax.nn`, NVIDIA GPU), a
        flash kernel for `FLASH_LENGTH` keys and more, heads whose width it takes and, for "splash", masks that are the
        same for all queries and heads, for "cudnn", types of 16 bits, and the plain form for all else; "chunked", some
        queries at a time
        (`chunked_attention`): for a CPU, and the plain form of `LONG` keys and more, with a mask that is the same for
        all heads.

    Returns:
      [B, S, K, A] in the dtype of `q_BSKA`. A query whose mask is False everywhere gets finite values.

    Raises:
      ValueError: the implementation has no such name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {implementation!r}; choose one of {list(IMPLEMENTATIONS)}")
    keys, width = k_BTGA.shape[1], k_BTGA.shape[3]
    same_for_queries = mask is None or mask.shape[1:3] == (1, 1)
    if implementation == "splash" and keys >= FLASH_LENGTH and width % flash_attention.LANES == 0 and same_for_queries:
        return flash_attention.attention(q_BSKA, k_BTGA, v_BTGA, None if mask is None else mask[:, 0, 0])
    if implementation == "chunked" or (implementation != "cudnn" and keys >= LONG):
        x_BSKA = chunked_attention.attention(q_BSKA, k_BTGA, v_BTGA, mask)
    else:
        taken = keys >= FLASH_LENGTH and q_BSKA.dtype.itemsize == 2 and width <= 128 and width % 8 == 0
        kernel = "cudnn" if implementation == "cudnn" and taken else "xla"
        x_BSKA = jax.nn.dot_product_attention(q_BSKA, k_BTGA, v_BTGA, mask=mask, implementation=kernel)
    return ad_checkpoint.checkpoint_name(x_BSKA, flash_attention.NAME)


def runnable(module: nn.Module, platform: str) -> nn.Module:
    """The module with attention that the platform ("tpu", "gpu", "cpu") has: the plain form for others' kernels."""

    def change(name: str, value: Any) -> Any:
        return "xla" if name == "implementation" and KERNELS.get(value, platform) != platform else value

    return changed(module, change)


def changed(module: nn.Module, change: Callable[[str, Any], Any]) -> nn.Module:
    """The module with `change(name, value)` for the fields of its own and of its parts."""
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module) if field.init}
    own = {name: value for name, value in fields.items() if name not in ("parent", "name")}
    return module.clone(
        **{name: changed(x, change) if isinstance(x, nn.Module) else change(name, x) for name, x in own.items()}
    )


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
        check_constancy_invariants=False,  # nothing is broadcast that a layer could change: one trace of it is enough
    )
    return scan(remat(block, policy))
