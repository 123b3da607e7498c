"""The scorers' vision towers: one vision transformer whose settings make InternViT or SigLIP.

Shape suffixes: B batch, H height, W width, C channels, P patch side, N image tokens, D model width, F MLP width,
K heads, A head width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from npedit_jax import parallel
from npedit_jax.models import layers

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}
NORMS = ("layer", "rms")


def cubic_weights(size: int, new_size: int) -> np.ndarray:
    """Matrix [new_size, size] of bicubic interpolation as PyTorch does it: a = -0.75, not antialiased, edges repeated.

    `jax.image.resize` has a = -0.5 and renormalises at the edges, so position tables resized by it would differ.
    """
    center = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(center).astype(int)
    weights = np.zeros((new_size, size))
    for tap in range(-1, 3):
        distance = np.abs(center - (first + tap))
        near = (1.25 * distance - 2.25) * distance**2 + 1.0
        far = -0.75 * (((distance - 5.0) * distance + 8.0) * distance - 4.0)
        column = np.clip(first + tap, 0, size - 1)
        np.add.at(weights, (np.arange(new_size), column), np.where(distance <= 1.0, near, far))
    return weights.astype(np.float32)


def resize_positions(positions_ND: jax.Array, height: int, width: int) -> jax.Array:
    """Interpolates a square table of positions [N, D] to `height` x `width` rows; the same size returns it as it is."""
    count, channels = positions_ND.shape
    side = round(count**0.5)
    if (height, width) == (side, side):
        return positions_ND
    grid = positions_ND.reshape(side, side, channels).astype(jnp.float32)
    grid = jnp.einsum("yh,xw,hwd->yxd", cubic_weights(side, height), cubic_weights(side, width), grid)
    return grid.reshape(height * width, channels).astype(positions_ND.dtype)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, as one matrix product over patches: [B, H, W, C] -> [B, H/P, W/P, D]."""

    width: int
    patch_size: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BHWC.shape
        size = self.patch_size
        kernel_PPCD = self.param(
            "kernel", nn.initializers.lecun_normal(), (size, size, channels, self.width), self.param_dtype
        )
        bias_D = self.param("bias", nn.initializers.zeros_init(), (self.width,), self.param_dtype)
        x = x_BHWC.astype(self.dtype).reshape(batch, height // size, size, width // size, size, channels)
        x_BHWD = jnp.einsum("bhpwqc,pqcd->bhwd", x, kernel_PPCD.astype(self.dtype))
        return x_BHWD + bias_D.astype(self.dtype).reshape(1, 1, 1, -1)


class Attention(nn.Module):
    """Self-attention of every token to every other; `qk_norm` is an RMS norm over all heads together (InternViT-6B)."""

    heads: int
    epsilon: float
    qkv_bias: bool
    qk_norm: bool
    implementation: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        batch, tokens, width = x_BND.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        q, k, v = (nn.Dense(width, self.qkv_bias, name=name, **types)(x_BND) for name in ("query", "key", "value"))
        if self.qk_norm:
            q = layers.RMSNorm(self.epsilon, name="query_norm", **types)(q)
            k = layers.RMSNorm(self.epsilon, name="key_norm", **types)(k)
        q_BNKA, k_BNKA, v_BNKA = (x.reshape(batch, tokens, self.heads, -1) for x in (q, k, v))
        x_BNKA = layers.attention(q_BNKA, k_BNKA, v_BNKA, implementation=self.implementation)
        return nn.Dense(width, name="output", **types)(x_BNKA.reshape(batch, tokens, width))


class Block(nn.Module):
    """One pre-norm layer: x + scale * attention(norm(x)), then x + scale * mlp(norm(x))."""

    heads: int
    mlp_width: int
    epsilon: float
    norm: str
    activation: str
    qkv_bias: bool
    qk_norm: bool
    layer_scale: float | None
    implementation: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> tuple[jax.Array, None]:
        x_BND = parallel.constrain_batch(x_BND)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = Attention(
            self.heads, self.epsilon, self.qkv_bias, self.qk_norm, self.implementation, name="attention", **types
        )
        x_BND = x_BND + self._scale("attention_scale", attention(self._normalize("attention_norm", x_BND)))
        y_BNF = nn.Dense(self.mlp_width, name="mlp_up", **types)(self._normalize("mlp_norm", x_BND))
        y_BND = nn.Dense(x_BND.shape[-1], name="mlp_down", **types)(ACTIVATIONS[self.activation](y_BNF))
        return x_BND + self._scale("mlp_scale", y_BND), None

    def _normalize(self, name: str, x_BND: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.norm == "rms":
            return layers.RMSNorm(self.epsilon, name=name, **types)(x_BND)
        return nn.LayerNorm(self.epsilon, use_fast_variance=False, name=name, **types)(x_BND)

    def _scale(self, name: str, x_BND: jax.Array) -> jax.Array:
        if self.layer_scale is None:
            return x_BND
        scale_D = self.param(name, nn.initializers.constant(self.layer_scale), x_BND.shape[-1:], self.param_dtype)
        return x_BND * jnp.broadcast_to(scale_D.astype(self.dtype), x_BND.shape)


class VisionTransformer(nn.Module):
    """Pixels -> tokens. The defaults are InternViT's; SigLIP has neither class token nor layer scale, and "gelu_tanh".

    Source: `modeling_intern_vit.InternVisionModel` (OpenGVLab), `transformers.models.siglip.modeling_siglip`.

    Attributes:
      patch_size: pixels along the side of a patch.
      image_size: pixels along the side of the square image that the position table belongs to.
      norm: "layer" or "rms" (InternViT-6B).
      activation: a key of `ACTIVATIONS`.
      layer_scale: initial factor on each residual branch; None has no such parameter.
      stem: output channels of 3x3 convolutions of stride 2, each followed by GELU, before the patch embedding, which
        then takes patches of `patch_size / 2**len(stem)`: a small network sees edges early. Empty at full size.
      remat: what the backward pass keeps of a layer, see `layers.remat`.
      implementation: of attention, see `layers.attention`.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int = 14
    image_size: int = 448
    epsilon: float = 1e-6
    norm: str = "layer"
    activation: str = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    class_token: bool = True
    layer_scale: float | None = 0.1
    stem: tuple[int, ...] = ()
    remat: str = "none"
    implementation: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Encodes prepared pixels.

        Args:
          pixels_BHWC: normalised pixels; rows and columns beyond the last whole patch are not looked at (of SigLIP's
            384, 6), and another size than `image_size` has the position table interpolated.

        Returns:
          [B, N, D] in `dtype`: the output of the last layer, without a final norm, patches in row order; a class token
          comes first where there is one.

        Raises:
          ValueError: images smaller than a patch, or settings that do not fit together, naming them.
        """
        self._check(pixels_BHWC.shape)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rows, columns = (side - side % self.patch_size for side in pixels_BHWC.shape[1:3])
        x = pixels_BHWC[:, :rows, :columns].astype(self.dtype)
        for index, channels in enumerate(self.stem):
            x = nn.gelu(
                nn.Conv(channels, (3, 3), strides=2, padding=1, name=f"stem_{index}", **types)(x), approximate=False
            )
        patch_size = self.patch_size // 2 ** len(self.stem)
        x_BHWD = PatchEmbedding(self.width, patch_size, name="patch_embedding", **types)(x)
        batch, height, width, _ = x_BHWD.shape
        x_BND = x_BHWD.reshape(batch, height * width, self.width)

        position_init = nn.initializers.normal(self.width**-0.5)
        count = (self.image_size // self.patch_size) ** 2 + self.class_token
        positions = self.param("positions", position_init, (count, self.width), self.param_dtype).astype(self.dtype)
        if self.class_token:
            token_1D = self.param("class_token", position_init, (1, self.width), self.param_dtype).astype(self.dtype)
            x_BND = jnp.concatenate([jnp.broadcast_to(token_1D, (batch, 1, self.width)), x_BND], axis=1)
            positions = jnp.concatenate([positions[:1], resize_positions(positions[1:], height, width)])
        else:
            positions = resize_positions(positions, height, width)

        blocks = layers.stack(Block, self.layers, self.remat, broadcast_arguments=0)(
            heads=self.heads,
            mlp_width=self.mlp_width,
            epsilon=self.epsilon,
            norm=self.norm,
            activation=self.activation,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            layer_scale=self.layer_scale,
            implementation=self.implementation,
            name="layers",
            **types,
        )
        return blocks(x_BND + positions[None])[0]

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; choose one of {list(NORMS)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {list(ACTIVATIONS)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, found width={self.width} and heads={self.heads}")
        if self.patch_size % 2 ** len(self.stem):
            raise ValueError(
                f"each of the stem's {len(self.stem)} convolutions halves the picture, so patch_size must be a "
                f"multiple of {2 ** len(self.stem)}, found {self.patch_size}"
            )
        if min(shape[1:3]) < self.patch_size:
            raise ValueError(
                f"expected images of at least one patch of {self.patch_size} pixels, found {shape[1]}x{shape[2]}; "
                "resize the images, or choose a smaller patch_size"
            )
