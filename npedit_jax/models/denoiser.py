"""The Z-Image transformer: one stream of image and caption tokens, with an optional reference image.

Source: `diffusers.models.transformers.transformer_z_image.ZImageTransformer2DModel`; the reference image with a
modulation of its own is NP-Edit's (arXiv 2510.14978).

Shape suffixes: B batch, H height, W width, C channels, N image tokens, L text tokens, S whole sequence, T conditioning
times, D model width, E time embedding width, F MLP width, K heads, A head width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from npedit_jax import parallel
from npedit_jax.models import layers, lora, positions

# Numbers that the original fixes in code, not in its config.
TIME_FREQUENCIES, TIME_HIDDEN, TIME_WIDTH = 256, 1024, 256
TIME_PERIOD = 10000.0
QK_NORM_EPSILON, FINAL_NORM_EPSILON = 1e-5, 1e-6
CHUNK = 2048  # most tokens of a long sequence that the MLP takes at a time

# Reading x0 as a velocity divides by the time; below this time the velocity is damped instead of blown up.
SMALLEST_DIVISOR = 0.05

CHOICES = {
    "pad_tokens": ("attend", "mask"),
    "prediction": ("velocity", "sample"),
    "position_embedding": ("none", "sinusoidal"),
}


def _dense(
    features: int, name: str, dtype: Any, param_dtype: Any, bias: bool = False, zero: bool = False
) -> lora.Dense:
    kernel_init = nn.initializers.zeros_init() if zero else nn.initializers.xavier_uniform()
    # By default a TPU rounds the factors of a float32 product to bfloat16.
    precision = "highest" if dtype == jnp.float32 else None
    types = dict(dtype=dtype, param_dtype=param_dtype, precision=precision)
    return lora.Dense(features, bias, kernel_init=kernel_init, name=name, **types)


class Attention(nn.Module):
    """Self-attention with an RMS norm per query and key head and rotary positions."""

    heads: int
    implementation: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BSD: jax.Array, rotation: positions.Rotation, mask_B11S: jax.Array | None) -> jax.Array:
        types = (self.dtype, self.param_dtype)
        width = x_BSD.shape[-1]

        def project(name: str) -> jax.Array:
            return _dense(width, name, *types)(x_BSD).reshape(*x_BSD.shape[:2], self.heads, width // self.heads)

        x_BSKA = layers.attention(
            RotaryNorm(*types, name="query_norm")(project("query"), rotation),
            RotaryNorm(*types, name="key_norm")(project("key"), rotation),
            project("value"),
            mask_B11S,
            implementation=self.implementation,
        )
        return _dense(width, "out", *types)(x_BSKA.reshape(x_BSD.shape))


class RotaryNorm(nn.Module):
    """`rotate(RMSNorm(x))` of query or key heads, computed in float32 and returned in `dtype`.

    The norm's scale is put into the tables, so that neighbours change places in the type in which `x` comes.
    """

    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BSKA: jax.Array, rotation: positions.Rotation) -> jax.Array:
        scale_A = self.param("scale", nn.initializers.ones_init(), (x_BSKA.shape[-1],), self.param_dtype)
        scale_111A = scale_A.astype(jnp.float32)[None, None, None]
        scaled = (rotation[0] * scale_111A, rotation[1] * positions.swap(scale_111A))
        mean_square_BSK1 = jnp.mean(jnp.square(x_BSKA.astype(jnp.float32)), axis=-1, keepdims=True)
        turned_BSKA = positions.rotate(x_BSKA, scaled) * jax.lax.rsqrt(mean_square_BSK1 + QK_NORM_EPSILON)
        return turned_BSKA.astype(self.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) with a hidden width of 8/3 of the model's, rounded down.

    `layers.LONG` tokens and more are taken some at a time, for the hidden width of all would be most of the memory.
    """

    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        if x_BSD.shape[1] < layers.LONG:
            return self._apply(x_BSD)
        scan = nn.scan(
            lambda module, _, x_BSD: (None, module._apply(x_BSD)),
            variable_broadcast=("params", "lora"),
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        batch, length, width = x_BSD.shape
        chunks = -(-length // CHUNK)
        x_BSD = jnp.pad(x_BSD, ((0, 0), (0, -length % chunks), (0, 0)))
        _, x_BNSD = scan(self, None, x_BSD.reshape(batch, chunks, -1, width))
        return x_BNSD.reshape(batch, -1, width)[:, :length]

    def _apply(self, x_BSD: jax.Array) -> jax.Array:
        types = (self.dtype, self.param_dtype)
        width = x_BSD.shape[-1]
        hidden = int(width / 3 * 8)
        gate_BSF = _dense(hidden, "gate", *types)(x_BSD)
        up_BSF = _dense(hidden, "up", *types)(x_BSD)
        return _dense(width, "down", *types)(nn.silu(gate_BSF) * up_BSF)


class Block(nn.Module):
    """One layer: x + gate * norm(f(norm(x) * scale)) with f attention, then the same with f the MLP.

    Attributes:
      modulated: scales and gates come from the time embedding; otherwise both are 1.
      clean_tokens: so many tokens at the front take the modulation of the first of two conditioning times, all others
        that of the last.
    """

    heads: int
    epsilon: float
    modulated: bool
    clean_tokens: int
    implementation: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, rotation: positions.Rotation, mask_B11S: jax.Array | None, time_BTE: jax.Array | None
    ) -> tuple[jax.Array, None]:
        x_BSD = parallel.constrain_batch(x_BSD)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = Attention(self.heads, self.implementation, name="attention", **types)
        mlp = MLP(name="mlp", **types)
        scale_1, gate_1, scale_2, gate_2 = self._modulation(x_BSD, time_BTE) if self.modulated else (1.0,) * 4

        def norm(name: str, x: jax.Array) -> jax.Array:
            # Float32 out: the scale or gate that follows is applied before the one rounding to `dtype`.
            return layers.RMSNorm(self.epsilon, jnp.float32, self.param_dtype, name=name)(x)

        h_BSD = attend((norm("attention_norm", x_BSD) * scale_1).astype(self.dtype), rotation, mask_B11S)
        x_BSD = (x_BSD + gate_1 * norm("attention_out_norm", h_BSD)).astype(self.dtype)
        h_BSD = mlp((norm("mlp_norm", x_BSD) * scale_2).astype(self.dtype))
        return (x_BSD + gate_2 * norm("mlp_out_norm", h_BSD)).astype(self.dtype), None

    def _modulation(self, x_BSD: jax.Array, time_BTE: jax.Array) -> tuple[jax.Array, ...]:
        """Scale and gate of the attention, then of the MLP, each [B, 1 or S, D] float32."""
        features = 4 * x_BSD.shape[-1]
        modulation = _dense(features, "modulation", jnp.float32, self.param_dtype, bias=True, zero=True)(time_BTE)
        scale_1, gate_1, scale_2, gate_2 = jnp.split(modulation, 4, axis=-1)
        parts = (1.0 + scale_1, jnp.tanh(gate_1), 1.0 + scale_2, jnp.tanh(gate_2))
        if not self.clean_tokens:
            return parts
        clean_S = (np.arange(x_BSD.shape[1]) < self.clean_tokens)[None, :, None]
        return tuple(jnp.where(clean_S, part_BTD[:, :1], part_BTD[:, 1:]) for part_BTD in parts)


class TimeEmbedding(nn.Module):
    """Sinusoids of Z-Image's own time (1 is clean), [cosines, sines], then a two-layer MLP; all in float32.

    Takes times of any shape and appends an axis of `width`.
    """

    width: int
    scale: float
    param_dtype: Any

    @nn.compact
    def __call__(self, time: jax.Array) -> jax.Array:
        half = TIME_FREQUENCIES // 2
        # Exponents rounded to float32 as in the original: angles reach 1000, where a frequency's last digit counts.
        exponent = -np.float32(np.log(TIME_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
        frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
        angle = (time.astype(jnp.float32) * self.scale)[..., None] * frequency.reshape((1,) * time.ndim + (half,))
        x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        types = (jnp.float32, self.param_dtype)
        x = nn.silu(_dense(TIME_HIDDEN, "hidden", *types, bias=True)(x))
        return _dense(self.width, "out", *types, bias=True)(x)


class FinalLayer(nn.Module):
    """Layer norm, a scale from the time embedding, and the projection to a patch; all in float32.

    The projection starts at zero.
    """

    features: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, time_B1E: jax.Array) -> jax.Array:
        types = (jnp.float32, self.param_dtype)
        scale_B1D = _dense(x_BND.shape[-1], "modulation", *types, bias=True, zero=True)(nn.silu(time_B1E))
        x_BND = nn.LayerNorm(
            FINAL_NORM_EPSILON, use_bias=False, use_scale=False, use_fast_variance=False, dtype=jnp.float32
        )(x_BND)
        return _dense(self.features, "projection", *types, bias=True, zero=True)(x_BND * (1.0 + scale_B1D))


class Denoiser(nn.Module):
    """Velocity of a noisy latent given a caption and, in the reference path, a clean latent of the same size.

    The defaults are Z-Image's full size. The module takes and gives npedit's convention (`t = 1` is noise, velocity =
    noise - x0); the weights' own (`1 - t`, minus the velocity) stays inside.

    A sample's caption counts as padded to a multiple of `pad_multiple` of its own length, with a learned token, and
    its image tokens likewise. Longer padding of the text array has no effect, nor do other samples of the batch.

    Attributes:
      text_width: width of the caption features.
      rope_widths: channels of a head that turn with the frame, row and column position; their sum is the head width.
      rope_lengths: positions that each axis has.
      time_scale: factor on the time before its sinusoids.
      pad_multiple: captions and images are padded to a multiple of so many tokens; 1 is no padding.
      pad_tokens: in the reference path, learned pad tokens "attend" and are attended to, or are hidden ("mask").
        Without a reference they always attend, as the base model was trained.
      prediction: what the network's output is read as: "velocity" as in Z-Image, or "sample": x0, turned into the
        velocity (x_t - x0) / max(t, 0.05).
      position_embedding: "sinusoidal" adds 2-D sinusoids to the embedded patches of every frame, "none" does not.
      remat: what the backward pass keeps of a layer, see `layers.remat`.
      implementation: of attention, see `layers.attention`.
    """

    channels: int = 16
    patch_size: int = 2
    width: int = 3840
    depth: int = 30
    refiner_depth: int = 2
    heads: int = 30
    text_width: int = 2560
    rope_widths: tuple[int, int, int] = (32, 48, 48)
    rope_lengths: tuple[int, int, int] = (1536, 512, 512)
    rope_theta: float = 256.0
    time_scale: float = 1000.0
    epsilon: float = 1e-5
    pad_multiple: int = 32
    pad_tokens: str = "attend"
    prediction: str = "velocity"
    position_embedding: str = "none"
    remat: str = "none"
    implementation: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents_BHWC: jax.Array,
        t_B: jax.Array,
        text_BLD: jax.Array,
        text_mask_BL: jax.Array,
        reference_BHWC: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the velocity [B, H, W, C] in float32.

        Args:
          latents_BHWC: noisy latents `x_t`; height and width multiples of `patch_size`.
          t_B: time in [0, 1], 1 is noise.
          text_BLD: caption features, tokens first, then padding of any content.
          text_mask_BL: True on caption tokens.
          reference_BHWC: clean latents to edit, of the shape of `latents_BHWC`.

        Raises:
          ValueError: shapes that do not fit each other, the patches or the rotary tables, or an unknown option.
        """
        _check_options(self)
        _check_shapes(self, latents_BHWC, text_BLD, reference_BHWC)
        frames = (latents_BHWC,) if reference_BHWC is None else (reference_BHWC, latents_BHWC)
        hide_pads = reference_BHWC is not None and self.pad_tokens == "mask"
        tokens = latents_BHWC.shape[1] * latents_BHWC.shape[2] // self.patch_size**2
        clean_tokens = tokens * (len(frames) - 1)

        length_B = jnp.sum(text_mask_BL.astype(jnp.int32), axis=-1)
        padded_B = _round_up(length_B, self.pad_multiple)
        image_BND = self._embed_image(frames, hide_pads)
        text_BLD = self._embed_text(text_BLD, text_mask_BL.astype(bool))
        sizes = (image_BND.shape[1], text_BLD.shape[1])

        grid = (len(frames), latents_BHWC.shape[1] // self.patch_size, latents_BHWC.shape[2] // self.patch_size)
        positions_BS3 = positions.joint_positions(grid, sizes, padded_B)
        rotation = positions.rotation(positions_BS3, self.rope_widths, self.rope_lengths, self.rope_theta)
        image_rotation, text_rotation = zip(*(jnp.split(part, [sizes[0]], axis=1) for part in rotation), strict=True)

        visible_B = length_B if hide_pads else padded_B
        text_visible_BL = jnp.arange(sizes[1])[None, :] < visible_B[:, None]
        visible_BS = jnp.pad(text_visible_BL, ((0, 0), (sizes[0], 0)), constant_values=True)

        own_time_BT = (1.0 - t_B.astype(jnp.float32))[:, None]
        if reference_BHWC is not None:
            own_time_BT = jnp.pad(own_time_BT, ((0, 0), (1, 0)), constant_values=1.0)
        time_width = min(self.width, TIME_WIDTH)
        time_BTE = TimeEmbedding(time_width, self.time_scale, self.param_dtype, name="time_embedding")(own_time_BT)

        image_BND = self._stack("noise_refiner", self.refiner_depth, clean_tokens)(
            image_BND, image_rotation, None, time_BTE
        )
        refine_text = self._stack("context_refiner", self.refiner_depth, modulated=False)
        text_BLD = refine_text(text_BLD, text_rotation, text_visible_BL[:, None, None], None)
        x_BSD = jnp.concatenate([image_BND, text_BLD], axis=1)
        x_BSD = self._stack("layers", self.depth, clean_tokens)(x_BSD, rotation, visible_BS[:, None, None], time_BTE)

        final = FinalLayer(self.channels * self.patch_size**2, self.param_dtype, name="final")
        patches_BNC = final(x_BSD[:, clean_tokens : clean_tokens + tokens], time_BTE[:, -1:])
        return self._velocity(_unpatchify(patches_BNC, grid[1:], self.patch_size), latents_BHWC, t_B)

    def _embed_image(self, frames: tuple[jax.Array, ...], hide_pads: bool) -> jax.Array:
        """Embedded patches of all frames, one after the other, then pad tokens, [B, N, D]."""
        patches_BNC = jnp.concatenate([_patchify(frame, self.patch_size) for frame in frames], axis=1)
        embed = _dense(self.width, "patch_embedding", self.dtype, self.param_dtype, bias=True)
        x_BND = embed(patches_BNC.astype(self.dtype))
        if self.position_embedding == "sinusoidal":
            rows, columns = frames[0].shape[1] // self.patch_size, frames[0].shape[2] // self.patch_size
            table_ND = np.tile(positions.sinusoids(rows, columns, self.width), (len(frames), 1))
            x_BND = x_BND + jnp.asarray(table_ND, self.dtype)[None]
        pad_1D = self._pad_token("x_pad_token")
        # A hidden token that nobody reads need not be there.
        pads = 0 if hide_pads else _round_up(x_BND.shape[1], self.pad_multiple) - x_BND.shape[1]
        return jnp.concatenate([x_BND, jnp.broadcast_to(pad_1D[None], (x_BND.shape[0], pads, self.width))], axis=1)

    def _embed_text(self, text_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        """Embedded caption tokens, then pad tokens up to the longest padded length, [B, L, D]."""
        length = text_BLD.shape[1]
        pads = ((0, 0), (0, _round_up(length, self.pad_multiple) - length))
        mask_BL1 = jnp.pad(mask_BL, pads)[..., None]
        # Zeroed before anything is computed, so that not even NaN in the padding reaches a gradient.
        text_BLD = jnp.where(mask_BL1, jnp.pad(text_BLD, (*pads, (0, 0))), 0)
        text_BLD = layers.RMSNorm(self.epsilon, self.dtype, self.param_dtype, name="caption_norm")(text_BLD)
        text_BLD = _dense(self.width, "caption_projection", self.dtype, self.param_dtype, bias=True)(text_BLD)
        return jnp.where(mask_BL1, text_BLD, self._pad_token("cap_pad_token")[None])

    def _pad_token(self, name: str) -> jax.Array:
        token_1D = self.param(name, nn.initializers.normal(0.02), (1, self.width), self.param_dtype)
        return token_1D.astype(self.dtype)

    def _stack(self, name: str, depth: int, clean_tokens: int = 0, modulated: bool = True) -> Callable[..., jax.Array]:
        """`depth` blocks under one scan, as a function of (tokens, rotation, mask, time embeddings)."""
        if not depth:
            return lambda x_BSD, *_: x_BSD
        blocks = layers.stack(Block, depth, self.remat, broadcast_arguments=3)(
            heads=self.heads,
            epsilon=self.epsilon,
            modulated=modulated,
            clean_tokens=clean_tokens,
            implementation=self.implementation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )
        return lambda *arguments: blocks(*arguments)[0]

    def _velocity(self, output_BHWC: jax.Array, latents_BHWC: jax.Array, t_B: jax.Array) -> jax.Array:
        if self.prediction == "velocity":
            return -output_BHWC
        divisor_B111 = jnp.maximum(t_B.astype(jnp.float32), SMALLEST_DIVISOR)[:, None, None, None]
        return (latents_BHWC.astype(jnp.float32) - output_BHWC) / divisor_B111


def _round_up(length: Any, multiple: int) -> Any:
    return -(-length // multiple) * multiple


def _patchify(x_BHWC: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] to [B, H / size * W / size, size * size * C], channel fastest."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def _unpatchify(x_BNC: jax.Array, grid: tuple[int, int], size: int) -> jax.Array:
    """The inverse of `_patchify` for a grid of (rows, columns) patches."""
    x = x_BNC.reshape(x_BNC.shape[0], *grid, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], grid[0] * size, grid[1] * size, -1)


def _check_options(module: Denoiser) -> None:
    for field, choices in CHOICES.items():
        if getattr(module, field) not in choices:
            raise ValueError(f"unknown {field} {getattr(module, field)!r}; choose one of {list(choices)}")
    if module.heads * sum(module.rope_widths) != module.width:
        raise ValueError(
            f"rope_widths must add up to the head width {module.width} / {module.heads}, found {module.rope_widths}; "
            "change width, heads or rope_widths"
        )
    if module.position_embedding == "sinusoidal" and module.width % 4:
        raise ValueError(f"sinusoidal positions need a width that 4 divides, found {module.width}; change width")


def _check_shapes(
    module: Denoiser, latents_BHWC: jax.Array, text_BLD: jax.Array, reference_BHWC: jax.Array | None
) -> None:
    size, (_, height, width, channels) = module.patch_size, latents_BHWC.shape
    if height % size or width % size or channels != module.channels:
        raise ValueError(
            f"expected latents [B, H, W, {module.channels}] with H and W multiples of {size}, found shape "
            f"{latents_BHWC.shape}; crop or pad the image before encoding it"
        )
    if text_BLD.shape[-1] != module.text_width:
        raise ValueError(
            f"expected caption features [B, L, {module.text_width}], found shape {text_BLD.shape}; "
            "use the text encoder that the denoiser was trained with"
        )
    if reference_BHWC is not None and reference_BHWC.shape != latents_BHWC.shape:
        raise ValueError(
            f"expected a reference of the latents' shape {latents_BHWC.shape}, found {reference_BHWC.shape}; "
            "resize the reference image to the size of the edit"
        )
    frames = 1 if reference_BHWC is None else 2
    needed = (_round_up(text_BLD.shape[1], module.pad_multiple) + frames + 1, height // size, width // size)
    if any(length < need for length, need in zip(module.rope_lengths, needed, strict=True)):
        raise ValueError(
            f"captions padded to {text_BLD.shape[1]} tokens and latents of {height} x {width} need rope_lengths of at "
            f"least {needed}, found {module.rope_lengths}; shorten the text, shrink the image or raise rope_lengths"
        )
