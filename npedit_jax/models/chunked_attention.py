"""Attention by one head and one chunk of queries at a time, the scores computed again in the backward pass.

For a CPU, whose cache then holds the scores: several times faster than writing them out for thousands of tokens, in a
fraction of the memory. On accelerators the loops are a loss.

Shape suffixes: B batch, S queries, T keys, K query heads, G key/value heads, A head width, N chunks, C queries of a
chunk.
"""

import jax
import jax.numpy as jnp

CHUNK = 256  # most queries in a chunk
MASKED = -1e30


def attention(q_BSKA: jax.Array, k_BTGA: jax.Array, v_BTGA: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """As `layers.attention`; products accumulate in float32.

    Raises:
      ValueError: a mask that differs between heads.
    """
    batch, length, heads, width = q_BSKA.shape
    if mask is not None and mask.shape[1] != 1:
        raise ValueError(f"chunked attention takes one mask for all heads, found a mask of shape {mask.shape}")
    chunks = -(-length // CHUNK)
    # A mask that is the same for all queries is not cut.
    cut = mask is not None and mask.shape[2] != 1
    mask_NBCT = _chunks(mask[:, 0], chunks) if cut else None
    shared_B1T = None if mask is None or cut else mask[:, 0]

    def head(arguments: tuple[jax.Array, ...]) -> jax.Array:
        q_BSA, k_BTA, v_BTA = arguments

        @jax.checkpoint
        def chunk(pair: tuple[jax.Array, jax.Array | None]) -> jax.Array:
            q_BCA, mask_BCT = pair
            return _attend(q_BCA, k_BTA, v_BTA, shared_B1T if mask_BCT is None else mask_BCT)

        x_NBCA = jax.lax.map(chunk, (_chunks(q_BSA, chunks), mask_NBCT))
        return x_NBCA.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]

    repeats = heads // k_BTGA.shape[2]
    k_KBTA, v_KBTA = (jnp.moveaxis(jnp.repeat(x, repeats, axis=2), 2, 0) for x in (k_BTGA, v_BTGA))
    x_KBSA = jax.lax.map(head, (jnp.moveaxis(q_BSKA, 2, 0), k_KBTA, v_KBTA))
    return jnp.moveaxis(x_KBSA, 0, 2)


def _chunks(x: jax.Array, chunks: int) -> jax.Array:
    """[B, S, ...] to [N, B, C, ...], the last chunk filled up with zeros."""
    size = -(-x.shape[1] // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * size - x.shape[1]), (0, 0)))
    return x.reshape(x.shape[0], chunks, size, x.shape[2]).swapaxes(0, 1)


def _attend(q_BCA: jax.Array, k_BTA: jax.Array, v_BTA: jax.Array, mask_BCT: jax.Array | None) -> jax.Array:
    product = lambda equation, *operands: jnp.einsum(  # noqa: E731
        equation, *operands, preferred_element_type=jnp.float32
    )
    scores_BCT = product("bca,bta->bct", q_BCA, k_BTA) * q_BCA.shape[-1] ** -0.5
    if mask_BCT is not None:
        scores_BCT = jnp.where(mask_BCT, scores_BCT, MASKED)
    weights_BCT = jnp.exp(scores_BCT - jnp.max(scores_BCT, axis=-1, keepdims=True))
    total_BC1 = jnp.sum(weights_BCT, axis=-1, keepdims=True)
    x_BCA = product("bct,bta->bca", weights_BCT.astype(v_BTA.dtype), v_BTA) / total_BC1
    return x_BCA.astype(q_BCA.dtype)
