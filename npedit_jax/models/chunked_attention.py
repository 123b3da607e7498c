"""Attention by one head and one chunk of queries at a time, the scores computed again in the backward pass.

For a CPU, whose cache then holds the scores: several times faster than writing them out for thousands of tokens, in a
fraction of the memory. On accelerators the loops are a loss. The backward pass is that of flash attention (arXiv
2205.14135, appendix B): each query's maximum and sum are those of the forward pass.

Shape suffixes: B batch, S queries, T keys, K query heads, G key/value heads, A head width, N chunks, C queries of a
chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q_BCA: jax.Array, k_BTA: jax.Array, mask_BCT: jax.Array | None) -> jax.Array:
    scores_BCT = _product("bca,bta->bct", q_BCA, k_BTA) * q_BCA.shape[-1] ** -0.5
    return scores_BCT if mask_BCT is None else jnp.where(mask_BCT, scores_BCT, MASKED)


@jax.custom_vjp
def _attend(q_BCA: jax.Array, k_BTA: jax.Array, v_BTA: jax.Array, mask_BCT: jax.Array | None) -> jax.Array:
    return _forward(q_BCA, k_BTA, v_BTA, mask_BCT)[0]


def _forward(
    q_BCA: jax.Array, k_BTA: jax.Array, v_BTA: jax.Array, mask_BCT: jax.Array | None
) -> tuple[jax.Array, tuple]:
    scores_BCT = _scores(q_BCA, k_BTA, mask_BCT)
    largest_BC1 = jnp.max(scores_BCT, axis=-1, keepdims=True)
    weights_BCT = jnp.exp(scores_BCT - largest_BC1)
    factor_BC1 = 1.0 / jnp.sum(weights_BCT, axis=-1, keepdims=True)
    x_BCA = (_product("bct,bta->bca", weights_BCT.astype(v_BTA.dtype), v_BTA) * factor_BC1).astype(q_BCA.dtype)
    # Not as one logsumexp: where a query sees no key, the maximum is so far from 0 that the sum would be lost in it.
    return x_BCA, (q_BCA, k_BTA, v_BTA, mask_BCT, x_BCA, largest_BC1, factor_BC1)


def _backward(kept: tuple, dx_BCA: jax.Array) -> tuple:
    q_BCA, k_BTA, v_BTA, mask_BCT, x_BCA, largest_BC1, factor_BC1 = kept
    weights_BCT = jnp.exp(_scores(q_BCA, k_BTA, mask_BCT) - largest_BC1) * factor_BC1
    shift_BC1 = jnp.sum(dx_BCA.astype(jnp.float32) * x_BCA.astype(jnp.float32), axis=-1, keepdims=True)
    dweights_BCT = _product("bca,bta->bct", dx_BCA, v_BTA)
    dscores_BCT = weights_BCT * (dweights_BCT - shift_BC1) * q_BCA.shape[-1] ** -0.5
    if mask_BCT is not None:
        dscores_BCT = jnp.where(mask_BCT, dscores_BCT, 0.0)
    dscores_BCT = dscores_BCT.astype(q_BCA.dtype)
    dq_BCA = _product("bct,bta->bca", dscores_BCT, k_BTA)
    dk_BTA = _product("bct,bca->bta", dscores_BCT, q_BCA)
    dv_BTA = _product("bct,bca->bta", weights_BCT.astype(v_BTA.dtype), dx_BCA)
    no_gradient = None if mask_BCT is None else np.zeros(mask_BCT.shape, jax.dtypes.float0)
    return dq_BCA.astype(q_BCA.dtype), dk_BTA.astype(k_BTA.dtype), dv_BTA.astype(v_BTA.dtype), no_gradient


_attend.defvjp(_forward, _backward)
