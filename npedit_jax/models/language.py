"""Qwen2 / Qwen2.5 / Qwen3 decoders, and the text encoder made of one.

Shape suffixes: B batch, L text tokens, S whole sequence, D model width, F MLP width, K query heads, G key/value heads,
A head width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from npedit_jax import parallel
from npedit_jax.models import layers

CHUNK_PARAMETERS = 2**26  # of a vocabulary's matrix used at a time, see `_vocabulary_product`


def token_positions(mask_BS: jax.Array) -> jax.Array:
    """Position of each token counted from the first true one, int32; tokens before it get 0.

    With padding on the right this is 0, 1, 2, ... also over the padding, as in the original.
    """
    first_B1 = jnp.argmax(mask_BS, axis=-1, keepdims=True).astype(jnp.int32)
    return jnp.maximum(jnp.arange(mask_BS.shape[-1], dtype=jnp.int32)[None] - first_B1, 0)


def causal_mask(mask_BS: jax.Array, segment_ids_BS: jax.Array | None = None) -> jax.Array:
    """Attention mask [B, S, S], True where a query (axis 1) may look: earlier or same, and true in `mask_BS`.

    Args:
      mask_BS: True on tokens, False on padding.
      segment_ids_BS: integers; tokens see their own segment and segment 0, a beginning that all share. None is one
        segment a row.
    """
    order_S = jnp.arange(mask_BS.shape[-1])
    allowed = (order_S[:, None] >= order_S[None, :])[None] & mask_BS.astype(bool)[:, None, :]
    if segment_ids_BS is not None:
        keys_B1S = segment_ids_BS[:, None, :]
        allowed &= (segment_ids_BS[:, :, None] == keys_B1S) | (keys_B1S == 0)
    return allowed


def rotary_tables(positions_BS: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine tables of rotary embedding, each [B, S, 1, A / 2], float32."""
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    frequency = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    angle = positions_BS.astype(jnp.float32)[:, :, None, None] * jnp.reshape(frequency, (1, 1, 1, -1))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BSKA: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + A / 2) of each head ("half-split" layout) in float32; keeps the dtype of `x_BSKA`."""
    cosine, sine = tables
    first, second = jnp.split(x_BSKA.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BSKA.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    heads: int
    kv_heads: int
    head_width: int
    epsilon: float
    qkv_bias: bool
    qk_norm: bool
    output_init: nn.initializers.Initializer
    implementation: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BSD: jax.Array, tables: tuple[jax.Array, jax.Array], mask_BSS: jax.Array) -> jax.Array:
        batch, length, width = x_BSD.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name: str, heads: int) -> jax.Array:
            x = nn.Dense(heads * self.head_width, use_bias=self.qkv_bias, name=name, **types)(x_BSD)
            return x.reshape(batch, length, heads, self.head_width)

        q_BSKA, k_BSGA, v_BSGA = (
            project("query", self.heads),
            project("key", self.kv_heads),
            project("value", self.kv_heads),
        )
        if self.qk_norm:
            q_BSKA = layers.RMSNorm(self.epsilon, name="query_norm", **types)(q_BSKA)
            k_BSGA = layers.RMSNorm(self.epsilon, name="key_norm", **types)(k_BSGA)
        x_BSKA = layers.attention(
            rotate(q_BSKA, tables),
            rotate(k_BSGA, tables),
            v_BSGA,
            mask_BSS[:, None],
            implementation=self.implementation,
        )
        output = nn.Dense(width, use_bias=False, kernel_init=self.output_init, name="output", **types)
        return output(x_BSKA.reshape(batch, length, -1))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    mlp_width: int
    output_init: nn.initializers.Initializer
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        types = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate_BSF = nn.Dense(self.mlp_width, name="gate", **types)(x_BSD)
        up_BSF = nn.Dense(self.mlp_width, name="up", **types)(x_BSD)
        down = nn.Dense(x_BSD.shape[-1], kernel_init=self.output_init, name="down", **types)
        return down(nn.silu(gate_BSF) * up_BSF)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    epsilon: float
    qkv_bias: bool
    qk_norm: bool
    output_init: nn.initializers.Initializer
    implementation: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, tables: tuple[jax.Array, jax.Array], mask_BSS: jax.Array
    ) -> tuple[jax.Array, None]:
        x_BSD = parallel.constrain_batch(x_BSD)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = Attention(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            epsilon=self.epsilon,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            output_init=self.output_init,
            implementation=self.implementation,
            name="attention",
            **types,
        )
        mlp = GatedMLP(self.mlp_width, self.output_init, name="mlp", **types)
        x_BSD = x_BSD + attention(layers.RMSNorm(self.epsilon, name="attention_norm", **types)(x_BSD), tables, mask_BSS)
        x_BSD = x_BSD + mlp(layers.RMSNorm(self.epsilon, name="mlp_norm", **types)(x_BSD))
        return x_BSD, None


class Decoder(nn.Module):
    """A causal Qwen decoder in three steps: `embed`, `__call__` (the layers) and `unembed`.

    Qwen2 and Qwen2.5 have `qkv_bias`; Qwen3 has `qk_norm` (an RMS norm per head). Initialised for training from
    scratch: unit-variance logits, and residual branches that shrink with depth (GPT-2).
    Source: `transformers.models.qwen2.modeling_qwen2`, `transformers.models.qwen3.modeling_qwen3`.

    Attributes:
      mlp_width: width between the gate and down projections.
      tied_embeddings: logits come from the embedding table instead of a matrix of their own.
      final_norm: normalise the output of the last layer; the text encoder reads it as it is.
      remat: what the backward pass keeps of a layer, see `layers.remat`.
      implementation: of attention, see `layers.attention`.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    rope_theta: float = 1e6
    epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    final_norm: bool = True
    remat: str = "none"
    implementation: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, found heads={self.heads} and kv_heads={self.kv_heads}; "
                "choose a kv_heads that divides heads"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = nn.Embed(
            self.vocabulary, self.width, embedding_init=nn.initializers.normal(self.width**-0.5), **types
        )
        self.blocks = layers.stack(Block, self.layers, self.remat, broadcast_arguments=2)(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            mlp_width=self.mlp_width,
            epsilon=self.epsilon,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            output_init=nn.initializers.variance_scaling(0.5 / self.layers, "fan_in", "truncated_normal"),
            implementation=self.implementation,
            name="layers",
            **types,
        )
        if self.final_norm:
            self.norm = layers.RMSNorm(self.epsilon, **types)
        if not self.tied_embeddings:
            self.unembedding = nn.Dense(self.vocabulary, use_bias=False, dot_general=_vocabulary_product, **types)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """Token ids [B, S] -> embeddings [B, S, D] in `dtype`."""
        # Each device looks its copy's samples up in its columns of the table, then samples and columns change places:
        # left to itself XLA gathers the table, or the samples of all copies.
        token_ids = parallel.constrain(token_ids, "data", None)
        x_BSD = parallel.constrain(self.embedding(token_ids), "data", None, parallel.SPLIT)
        return parallel.constrain_batch(x_BSD)

    def __call__(self, embeddings_BSD: jax.Array, positions_BS: jax.Array, mask_BSS: jax.Array) -> jax.Array:
        """Runs the layers.

        Args:
          embeddings_BSD: inputs, tokens and image tokens alike.
          positions_BS: integers for the rotary embedding.
          mask_BSS: bool, True where a query (axis 1) may look at a key (axis 2); it has to be causal already.

        Returns:
          [B, S, D] in `dtype`, after the final norm when there is one.
        """
        tables = rotary_tables(positions_BS, self.head_width, self.rope_theta)
        hidden_BSD, _ = self.blocks(embeddings_BSD.astype(self.dtype), tables, mask_BSS)
        return self.norm(hidden_BSD) if self.final_norm else hidden_BSD

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> logits [..., V] in float32."""
        if not self.tied_embeddings:
            return self.unembedding(hidden)
        table_VD = self.embedding.embedding.astype(self.dtype)
        hidden = hidden.astype(self.dtype)
        return _vocabulary_product(hidden, table_VD, (((hidden.ndim - 1,), (1,)), ((), ())))


def _vocabulary_product(left, right, dimension_numbers, precision=None, preferred_element_type=None) -> jax.Array:
    """`jax.lax.dot_general` of hidden states and a matrix of a vocabulary, in float32 whatever the operands are.

    A large matrix is taken some columns at a time: a device that holds a part of it then never gathers all of it.
    """
    del preferred_element_type
    product = lambda right: jax.lax.dot_general(  # noqa: E731
        left, right, dimension_numbers, precision, preferred_element_type=jnp.float32
    )
    ((_, (width_axis,)), _) = dimension_numbers
    axis = 1 - width_axis
    vocabulary = right.shape[axis]
    chunks = -(-right.size // CHUNK_PARAMETERS)
    if chunks == 1:
        return product(right)
    size = -(-vocabulary // chunks)

    def add_columns(logits: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        # The last columns are those up to the end: what two chunks share is computed twice, to the same numbers.
        start = jnp.minimum(number * size, vocabulary - size)
        columns = product(jax.lax.dynamic_slice_in_dim(right, start, size, axis))
        return jax.lax.dynamic_update_slice_in_dim(logits, columns, start, logits.ndim - 1), None

    logits = jnp.zeros((*left.shape[:-1], vocabulary), jnp.float32)
    return jax.lax.scan(jax.checkpoint(add_columns), logits, jnp.arange(chunks))[0]


class TextEncoder(nn.Module):
    """Text -> hidden states of a decoder without its final norm.

    The diffusion transformer reads the second-to-last layer of its language model, so `decoder` has one layer less
    than the language model that the weights come from, and `final_norm=False`.
    Source: `diffusers.pipelines.z_image.pipeline_z_image.ZImagePipeline._encode_prompt`.

    Attributes:
      names: how the tensors are called on disk, as those of a "base" model or of a "causal" one, which has a head.
    """

    decoder: Decoder
    names: str = "base"

    @nn.compact
    def __call__(self, token_ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        """Encodes a batch of padded prompts.

        Args:
          token_ids_BL: integers, padded on the right or on the left.
          mask_BL: True (or 1) on tokens, False on padding.

        Returns:
          [B, L, D] in the decoder's dtype. Rows on padding are finite and mean nothing: mask them.

        Raises:
          ValueError: the decoder normalises its output.
        """
        if self.decoder.final_norm:
            raise ValueError(
                "a text encoder reads a layer's output without norm, found a decoder with final_norm=True; "
                "build it with final_norm=False"
            )
        mask_BL = mask_BL.astype(bool)
        embeddings_BLD = self.decoder.embed(token_ids_BL)
        return self.decoder(embeddings_BLD, token_positions(mask_BL), causal_mask(mask_BL))
