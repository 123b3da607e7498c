"""The FLUX-shape convolutional autoencoder (`AutoencoderKL`): pixels to scaled latents and back.

Source: `diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL`.
Shape suffixes: B batch, H height, W width, C channels, N spatial positions, G norm groups.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from npedit_jax import parallel
from npedit_jax.models.layers import REMAT_POLICIES, attention

EPSILON = 1e-6
# Range of the log variance (diffusers `DiagonalGaussianDistribution`): keeps exp() finite early in training.
LOGVAR_RANGE = (-30.0, 20.0)


class GroupNorm(nn.Module):
    """Group norm over height, width and the channels of a group, computed in float32 and returned in `dtype`.

    Statistics are first taken per channel and then averaged over the groups: the large reductions then keep channels
    innermost, which XLA vectorises on CPU, where reducing over part of the innermost axis is several times slower.
    """

    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        channels = x_BHWC.shape[-1]
        if channels % self.groups:
            raise ValueError(f"{self.groups} norm groups do not divide {channels} channels; change groups or widths")
        scale_C = self.param("scale", nn.initializers.ones_init(), (channels,), self.param_dtype)
        bias_C = self.param("bias", nn.initializers.zeros_init(), (channels,), self.param_dtype)

        def group_mean(y_BHWC: jax.Array) -> jax.Array:
            mean_BC = jnp.mean(y_BHWC, axis=(1, 2))
            mean_BG = jnp.mean(mean_BC.reshape(mean_BC.shape[0], self.groups, -1), axis=-1)
            return jnp.repeat(mean_BG, channels // self.groups, axis=-1)[:, None, None, :]

        x_BHWC = x_BHWC.astype(jnp.float32)
        centred_BHWC = x_BHWC - group_mean(x_BHWC)
        inverse_B11C = jax.lax.rsqrt(group_mean(jnp.square(centred_BHWC)) + EPSILON)
        gain_B11C = inverse_B11C * scale_C.astype(jnp.float32)[None, None, None, :]
        y_BHWC = centred_BHWC * gain_B11C + bias_C.astype(jnp.float32)[None, None, None, :]
        return y_BHWC.astype(self.dtype)


class ResnetBlock(nn.Module):
    """Two (norm, SiLU, 3x3 convolution) with a skip connection, which is a 1x1 convolution where the width changes."""

    features: int
    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x_BHWC = parallel.constrain_batch(x_BHWC)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y_BHWC = nn.silu(GroupNorm(self.groups, name="norm_1", **types)(x_BHWC))
        y_BHWC = nn.Conv(self.features, (3, 3), name="conv_1", **types)(y_BHWC)
        y_BHWC = nn.silu(GroupNorm(self.groups, name="norm_2", **types)(y_BHWC))
        y_BHWC = nn.Conv(self.features, (3, 3), name="conv_2", **types)(y_BHWC)
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = nn.Conv(self.features, (1, 1), name="shortcut", **types)(x_BHWC)
        return x_BHWC + y_BHWC


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, with a skip connection."""

    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BHWC.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y_BNC = GroupNorm(self.groups, name="norm", **types)(x_BHWC).reshape(batch, height * width, channels)
        q_BNC, k_BNC, v_BNC = (nn.Dense(channels, name=name, **types)(y_BNC) for name in ("query", "key", "value"))
        y_BN1C = attention(q_BNC[:, :, None, :], k_BNC[:, :, None, :], v_BNC[:, :, None, :])
        y_BNC = nn.Dense(channels, name="out", **types)(y_BN1C[:, :, 0, :])
        return x_BHWC + y_BNC.reshape(x_BHWC.shape)


class MiddleBlock(nn.Module):
    """Residual block, optional attention, residual block, at the lowest resolution."""

    groups: int
    attend: bool
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        features = x_BHWC.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        resnet = _rematerialised(ResnetBlock, self.remat)
        x_BHWC = resnet(features, self.groups, name="resnet_0", **types)(x_BHWC)
        if self.attend:
            x_BHWC = _rematerialised(SpatialAttention, self.remat)(self.groups, name="attention", **types)(x_BHWC)
        return resnet(features, self.groups, name="resnet_1", **types)(x_BHWC)


class Encoder(nn.Module):
    """Pixels to the concatenated mean and log variance; every block but the last halves height and width."""

    block_out_channels: Sequence[int]
    layers_per_block: int
    latent_channels: int
    groups: int
    middle_attention: bool
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        resnet = _rematerialised(ResnetBlock, self.remat)
        x_BHWC = nn.Conv(self.block_out_channels[0], (3, 3), name="conv_in", **types)(x_BHWC)
        for i, features in enumerate(self.block_out_channels):
            for j in range(self.layers_per_block):
                x_BHWC = resnet(features, self.groups, name=f"down_{i}_resnet_{j}", **types)(x_BHWC)
            if i < len(self.block_out_channels) - 1:
                # Padded below and to the right only: the original's downsampler, not the symmetric default.
                convolution = nn.Conv(features, (3, 3), 2, ((0, 1), (0, 1)), name=f"down_{i}_downsample", **types)
                x_BHWC = convolution(x_BHWC)
        x_BHWC = MiddleBlock(self.groups, self.middle_attention, self.remat, name="middle", **types)(x_BHWC)
        x_BHWC = nn.silu(GroupNorm(self.groups, name="norm_out", **types)(x_BHWC))
        return nn.Conv(2 * self.latent_channels, (3, 3), name="conv_out", **types)(x_BHWC)


class Decoder(nn.Module):
    """Latents to pixels; every block but the last doubles height and width (nearest neighbour, then 3x3)."""

    block_out_channels: Sequence[int]
    layers_per_block: int
    image_channels: int
    groups: int
    middle_attention: bool
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        resnet = _rematerialised(ResnetBlock, self.remat)
        x_BHWC = nn.Conv(self.block_out_channels[-1], (3, 3), name="conv_in", **types)(z_BHWC)
        x_BHWC = MiddleBlock(self.groups, self.middle_attention, self.remat, name="middle", **types)(x_BHWC)
        for i, features in enumerate(reversed(self.block_out_channels)):
            for j in range(self.layers_per_block + 1):
                x_BHWC = resnet(features, self.groups, name=f"up_{i}_resnet_{j}", **types)(x_BHWC)
            if i < len(self.block_out_channels) - 1:
                x_BHWC = jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)
                x_BHWC = nn.Conv(features, (3, 3), name=f"up_{i}_upsample", **types)(x_BHWC)
        x_BHWC = nn.silu(GroupNorm(self.groups, name="norm_out", **types)(x_BHWC))
        return nn.Conv(self.image_channels, (3, 3), name="conv_out", **types)(x_BHWC)


class Autoencoder(nn.Module):
    """The autoencoder with its latent scaling; `n` blocks reduce height and width by 2^(n-1).

    Attributes:
      block_out_channels: width of each block, highest resolution first.
      scaling_factor, shift_factor: latents = (mean - shift) * scale.
      quant_conv, post_quant_conv: 1x1 convolutions around the latent, which FLUX-shape checkpoints leave out.
      remat: what the backward pass keeps of each residual and attention block, a policy name of `models.layers`.
      slice_batch: images encoded or decoded at a time, one slice after the other; 0 takes the batch whole.
    """

    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    image_channels: int = 3
    groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    middle_attention: bool = True
    quant_conv: bool = False
    post_quant_conv: bool = False
    remat: str = "none"
    slice_batch: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def downscale(self) -> int:
        """Pixels along the side of a latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {"groups": self.groups, "middle_attention": self.middle_attention, "remat": self.remat, **types}
        self.encoder = Encoder(self.block_out_channels, self.layers_per_block, self.latent_channels, **common)
        self.decoder = Decoder(self.block_out_channels, self.layers_per_block, self.image_channels, **common)
        if self.quant_conv:
            self.quant = nn.Conv(2 * self.latent_channels, (1, 1), **types)
        if self.post_quant_conv:
            self.post_quant = nn.Conv(self.latent_channels, (1, 1), **types)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns the reconstruction `decode(encode(images))`; initialises the parameters of both halves."""
        return self.decode(self.encode(images_BHWC))

    def encode(self, images_BHWC: jax.Array) -> jax.Array:
        """Encodes pixels in [-1, 1] to scaled latents: the mean of the distribution, nothing is sampled.

        Args:
          images_BHWC: [batch, height, width, 3]; sides that are multiples of 2^(n-1) come back from `decode` unchanged.

        Returns:
          [batch, height / 2^(n-1), width / 2^(n-1), latent_channels], float32.
        """
        mean_BHWC, _ = self.encode_moments(images_BHWC)
        return (mean_BHWC - self.shift_factor) * self.scaling_factor

    def encode_moments(self, images_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the *unscaled* mean and log variance (clipped to [-30, 20]) of the latent distribution, float32."""
        moments_BHWC = self._in_slices(Autoencoder._encode, images_BHWC).astype(jnp.float32)
        mean_BHWC, logvar_BHWC = jnp.split(moments_BHWC, 2, axis=-1)
        return mean_BHWC, jnp.clip(logvar_BHWC, *LOGVAR_RANGE)

    def decode(self, latents_BHWC: jax.Array) -> jax.Array:
        """Decodes scaled latents to pixels, about [-1, 1] and not clipped, float32; the inverse shapes of `encode`."""
        z_BHWC = latents_BHWC.astype(jnp.float32) / self.scaling_factor + self.shift_factor
        return self._in_slices(Autoencoder._decode, z_BHWC).astype(jnp.float32)

    def _encode(self, images_BHWC: jax.Array) -> jax.Array:
        moments_BHWC = self.encoder(images_BHWC)
        return self.quant(moments_BHWC) if self.quant_conv else moments_BHWC

    def _decode(self, z_BHWC: jax.Array) -> jax.Array:
        return self.decoder(self.post_quant(z_BHWC) if self.post_quant_conv else z_BHWC)

    def _in_slices(self, function: Callable, x_BHWC: jax.Array) -> jax.Array:
        """Applies `function(self, x)` to `slice_batch` samples at a time; a shorter last slice is run by itself."""
        batch, size = x_BHWC.shape[0], self.slice_batch
        if not 0 < size < batch or self.is_initializing():
            return function(self, x_BHWC)
        whole = batch // size * size
        sliced = x_BHWC[:whole].reshape(whole // size, size, *x_BHWC.shape[1:])
        # The lifted form of jax.lax.map: a bare one may not touch a module's parameters.
        body = nn.scan(lambda module, carry, x: (carry, function(module, x)), variable_broadcast="params")
        _, y = body(self, None, sliced)
        y = y.reshape(whole, *y.shape[2:])
        return y if whole == batch else jnp.concatenate([y, function(self, x_BHWC[whole:])])


def _rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Like `layers.remat` for blocks outside a scan, where XLA must be kept from merging the recomputation away."""
    if policy == "none":
        return block
    if policy not in REMAT_POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}; choose one of {['none', *REMAT_POLICIES]}")
    return nn.remat(block, policy=REMAT_POLICIES[policy])
