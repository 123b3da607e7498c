"""The autoencoder's weights in diffusers' layout (`AutoencoderKL`)."""

from typing import Any

from npedit_jax.models.autoencoder import Autoencoder
from npedit_jax.weights.table import Row

# Settings of `AutoencoderKL` that only one value of is built here, with that value.
FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
DOWN_BLOCK, UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"


def build(config: dict[str, Any], **options: Any) -> Autoencoder:
    """Builds the module of a diffusers `AutoencoderKL` config.json; absent keys take diffusers' defaults.

    Args:
      options: module fields that the file does not hold (`dtype`, `remat`, `slice_batch`), or overrides.

    Raises:
      ValueError: the config asks for blocks, an activation or a latent normalisation that the module does not have.
    """
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"autoencoder config has {key} = {config[key]!r}; only {value!r} is supported")
    for key, block in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
        if set(config.get(key, [block])) != {block}:
            raise ValueError(f"autoencoder config has {key} = {config[key]!r}; only {block!r} blocks are supported")
    if config.get("out_channels", 3) != config.get("in_channels", 3):
        raise ValueError(
            f"autoencoder config has in_channels = {config.get('in_channels', 3)} but out_channels = "
            f"{config.get('out_channels', 3)}; they must be equal"
        )
    fields = {
        "block_out_channels": tuple(config.get("block_out_channels", (64,))),
        "layers_per_block": config.get("layers_per_block", 1),
        "latent_channels": config.get("latent_channels", 4),
        "image_channels": config.get("in_channels", 3),
        "groups": config.get("norm_num_groups", 32),
        "scaling_factor": config.get("scaling_factor", 0.18215),
        "shift_factor": config.get("shift_factor") or 0.0,
        "middle_attention": config.get("mid_block_add_attention", True),
        "quant_conv": config.get("use_quant_conv", True),
        "post_quant_conv": config.get("use_post_quant_conv", True),
    }
    return Autoencoder(**(fields | options))


def describe(module: Autoencoder) -> dict[str, Any]:
    """Returns the diffusers config.json of the module, from which `build` makes the same network again."""
    blocks = len(module.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **FIXED,
        "block_out_channels": list(module.block_out_channels),
        "down_block_types": [DOWN_BLOCK] * blocks,
        "up_block_types": [UP_BLOCK] * blocks,
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "latent_channels": module.latent_channels,
        "layers_per_block": module.layers_per_block,
        "norm_num_groups": module.groups,
        "scaling_factor": module.scaling_factor,
        "shift_factor": module.shift_factor,
        "mid_block_add_attention": module.middle_attention,
        "use_quant_conv": module.quant_conv,
        "use_post_quant_conv": module.post_quant_conv,
        # Diffusers runs the network in float32 unless told otherwise, as the frozen autoencoder is kept here.
        "force_upcast": True,
    }


def rows(module: Autoencoder) -> list[Row]:
    """Returns the name-mapping table of the module."""
    widths, layers = list(module.block_out_channels), module.layers_per_block
    table = _encoder_rows(widths, layers) + _decoder_rows(widths[::-1], layers + 1)
    for half in ("encoder", "decoder"):
        table += _conv(f"{half}.conv_in", f"{half}/conv_in")
        table += _middle(half, module.middle_attention)
        table += _norm(f"{half}.conv_norm_out", f"{half}/norm_out")
        table += _conv(f"{half}.conv_out", f"{half}/conv_out")
    if module.quant_conv:
        table += _conv("quant_conv", "quant")
    if module.post_quant_conv:
        table += _conv("post_quant_conv", "post_quant")
    return table


def _encoder_rows(widths: list[int], layers: int) -> list[Row]:
    table, incoming = [], widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            source, target = f"encoder.down_blocks.{i}.resnets.{j}", f"encoder/down_{i}_resnet_{j}"
            table += _resnet(source, target, shortcut=j == 0 and incoming != width)
        if i < len(widths) - 1:
            table += _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder/down_{i}_downsample")
        incoming = width
    return table


def _decoder_rows(widths: list[int], layers: int) -> list[Row]:
    table, incoming = [], widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            source, target = f"decoder.up_blocks.{i}.resnets.{j}", f"decoder/up_{i}_resnet_{j}"
            table += _resnet(source, target, shortcut=j == 0 and incoming != width)
        if i < len(widths) - 1:
            table += _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder/up_{i}_upsample")
        incoming = width
    return table


def _middle(half: str, attend: bool) -> list[Row]:
    table = _resnet(f"{half}.mid_block.resnets.0", f"{half}/middle/resnet_0")
    table += _resnet(f"{half}.mid_block.resnets.1", f"{half}/middle/resnet_1")
    if attend:
        source, target = f"{half}.mid_block.attentions.0", f"{half}/middle/attention"
        table += _norm(f"{source}.group_norm", f"{target}/norm")
        for theirs, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
            table.append(Row(f"{source}.{theirs}.weight", f"{target}/{ours}/kernel", "dense"))
            table.append(Row(f"{source}.{theirs}.bias", f"{target}/{ours}/bias"))
    return table


def _resnet(source: str, target: str, shortcut: bool = False) -> list[Row]:
    table = []
    for n in (1, 2):
        table += _norm(f"{source}.norm{n}", f"{target}/norm_{n}")
        table += _conv(f"{source}.conv{n}", f"{target}/conv_{n}")
    return table + (_conv(f"{source}.conv_shortcut", f"{target}/shortcut") if shortcut else [])


def _norm(source: str, target: str) -> list[Row]:
    return [Row(f"{source}.weight", f"{target}/scale"), Row(f"{source}.bias", f"{target}/bias")]


def _conv(source: str, target: str) -> list[Row]:
    return [Row(f"{source}.weight", f"{target}/kernel", "conv"), Row(f"{source}.bias", f"{target}/bias")]
