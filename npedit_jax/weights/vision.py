"""Rows of the vision towers' tables: what InternVL's two layouts and LLaVA-OneVision's SigLIP share."""

from typing import NamedTuple

from npedit_jax.models.vision import VisionTransformer
from npedit_jax.weights.table import Row


class LayerNames(NamedTuple):
    """What a checkpoint calls the parts of a vision layer; `attention` holds "{name}" for query, key and value.

    `attention` without "{name}" is one fused projection; `scales` and the norms of query and key are there in towers
    that have them.
    """

    attention: str
    output: str
    attention_norm: str
    mlp_norm: str
    scales: tuple[str, str] = ("", "")
    query_norm: str = ""
    key_norm: str = ""


def dense_rows(
    source: str, target: str, layers: int = 0, bias: bool = True, part: int = 0, parts: int = 1
) -> list[Row]:
    """Rows of a linear layer: kernel, and bias where it has one."""
    table = [Row(f"{source}.weight", f"{target}/kernel", "dense", layers, part=part, parts=parts)]
    return table + [Row(f"{source}.bias", f"{target}/bias", "copy", layers, part=part, parts=parts)] * bias


def norm_rows(source: str, target: str, layers: int = 0, bias: bool = True) -> list[Row]:
    """Rows of a norm: scale, and bias where it has one (an RMS norm has none)."""
    table = [Row(f"{source}.weight", f"{target}/scale", "copy", layers)]
    return table + [Row(f"{source}.bias", f"{target}/bias", "copy", layers)] * bias


def conv_rows(source: str, target: str) -> list[Row]:
    """Rows of a convolution with bias."""
    return [Row(f"{source}.weight", f"{target}/kernel", "conv"), Row(f"{source}.bias", f"{target}/bias")]


def layer_rows(vision: VisionTransformer, source: str, target: str, names: LayerNames) -> list[Row]:
    """Rows of the stacked layers of a tower; `source` is a layer's name and holds "{i}"."""
    count, table = vision.layers, []
    for part, name in enumerate(("query", "key", "value")):
        pieces = {"part": part, "parts": 3} if "{name}" not in names.attention else {}
        theirs = names.attention.replace("{name}", name[0])
        table += dense_rows(f"{source}.{theirs}", f"{target}/attention/{name}", count, vision.qkv_bias, **pieces)
    table += dense_rows(f"{source}.{names.output}", f"{target}/attention/output", count)
    if vision.qk_norm:
        table += norm_rows(f"{source}.{names.query_norm}", f"{target}/attention/query_norm", count, bias=False)
        table += norm_rows(f"{source}.{names.key_norm}", f"{target}/attention/key_norm", count, bias=False)
    table += norm_rows(f"{source}.{names.attention_norm}", f"{target}/attention_norm", count, vision.norm == "layer")
    table += norm_rows(f"{source}.{names.mlp_norm}", f"{target}/mlp_norm", count, vision.norm == "layer")
    table += dense_rows(f"{source}.mlp.fc1", f"{target}/mlp_up", count)
    table += dense_rows(f"{source}.mlp.fc2", f"{target}/mlp_down", count)
    if vision.layer_scale is not None:
        for theirs, ours in zip(names.scales, ("attention_scale", "mlp_scale"), strict=True):
            table.append(Row(f"{source}.{theirs}", f"{target}/{ours}", "copy", count))
    return table
