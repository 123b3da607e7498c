"""Attention by JAX's own TPU flash kernel (splash attention), on every device for its own samples and heads.

Shape suffixes: B batch, S queries, T keys, K query heads, G key/value heads, A head width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from npedit_jax import parallel

LANES = 128  # the kernel's lengths and head widths are multiples of it
BLOCKS = (512, 384, 256, 128)  # tokens of a tile, the largest that divides the length
NAME = "attention"  # of the kernel's results for remat policies


def attention(
    q_BSKA: jax.Array, k_BTGA: jax.Array, v_BTGA: jax.Array, visible_BT: jax.Array | None = None
) -> jax.Array:
    """As `layers.attention`, with a mask that is the same for all queries and heads.

    On another machine than a TPU the kernel is interpreted, for tests.

    Args:
      visible_BT: bool, True on keys that queries may look at, at least one of a sample; None is all. Both axes may be
        broadcast.
    """
    if visible_BT is not None:
        visible_BT = jnp.broadcast_to(visible_BT, k_BTGA.shape[:2])
    rows, heads = q_BSKA.shape[:2], q_BSKA.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _attend(q_BSKA, k_BTGA, v_BTGA, visible_BT)
    batch = parallel.BATCH if rows[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    split = mesh.shape["tensor"]
    over_heads = "tensor" if heads % split == 0 and k_BTGA.shape[2] % split == 0 else None
    tokens, mask = PartitionSpec(batch, None, over_heads, None), PartitionSpec(batch, None)
    if visible_BT is None:
        visible_BT = jnp.ones((k_BTGA.shape[0], k_BTGA.shape[1]), bool)
    # XLA cannot split a kernel by itself.
    return jax.shard_map(_attend, in_specs=(tokens, tokens, tokens, mask), out_specs=tokens, check_vma=False)(
        q_BSKA, k_BTGA, v_BTGA, visible_BT
    )


def _attend(q_BSKA: jax.Array, k_BTGA: jax.Array, v_BTGA: jax.Array, visible_BT: jax.Array | None) -> jax.Array:
    (batch, queries, heads, width), keys = q_BSKA.shape, k_BTGA.shape[1]
    q_BSKA = q_BSKA * jnp.asarray(width**-0.5, q_BSKA.dtype)
    q_BKSA, k_BGTA, v_BGTA = (_padded(x).swapaxes(1, 2) for x in (q_BSKA, k_BTGA, v_BTGA))
    sizes = (q_BKSA.shape[2], k_BGTA.shape[2])
    segments = None
    if visible_BT is not None or sizes[1] > keys:
        if visible_BT is None:
            visible_BT = jnp.ones((batch, keys), bool)
        # Every query is of segment 1, and so are the keys that it may look at.
        key_segments = jnp.pad(visible_BT.astype(jnp.int32), ((0, 0), (0, sizes[1] - keys)))
        segments = splash.SegmentIds(jnp.ones((batch, sizes[0]), jnp.int32), key_segments)
    x_BKSA = jax.vmap(_kernel(heads, *sizes))(q_BKSA, k_BGTA, v_BGTA, segments)
    return x_BKSA.swapaxes(1, 2)[:, :queries]


def _padded(x_BSKA: jax.Array) -> jax.Array:
    length = x_BSKA.shape[1]
    return jnp.pad(x_BSKA, ((0, 0), (0, -length % LANES), (0, 0), (0, 0)))


def _kernel(heads: int, queries: int, keys: int) -> splash.splash_attention_kernel.SplashAttentionKernel:
    of_queries, of_keys = (next(size for size in BLOCKS if length % size == 0) for length in (queries, keys))
    return splash.make_splash_mha(
        splash.splash_attention_mask.MultiHeadMask([splash.FullMask((queries, keys))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=of_queries,
            block_kv=of_keys,
            block_q_dkv=of_queries,
            block_kv_dkv=of_keys,
            block_q_dq=of_queries,
            block_kv_dq=of_keys,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=NAME,
        interpret=_platform() != "tpu",
    )


def _platform() -> str:
    """Of the devices that the program is for, which need not be this machine's."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device is not None else jax.default_backend()
