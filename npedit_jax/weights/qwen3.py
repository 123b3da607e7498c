"""Qwen3 as text encoder, in transformers' layout (`Qwen3Model` or `Qwen3ForCausalLM`).

The text encoder reads the second-to-last layer: the last layer, the final norm and the output matrix (which the file
may lack, where it is tied to the embedding or was not saved) are `unused` rows.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from npedit_jax.models.language import TextEncoder
from npedit_jax.weights.language import build_decoder, decoder_rows, describe_decoder, layer_rows
from npedit_jax.weights.table import Row

# By `TextEncoder.names`.
PREFIXES = {"base": "", "causal": "model."}
ARCHITECTURES = {"base": "Qwen3Model", "causal": "Qwen3ForCausalLM"}


def build(config: dict[str, Any], **options: Any) -> TextEncoder:
    """Builds the text encoder of a Qwen3 `config.json`: all layers but the last.

    Args:
      options: fields of `Decoder` that the file does not hold (`dtype`, `remat`, ...), or overrides.

    Raises:
      ValueError: not a Qwen3 config, or one of less than two layers.
    """
    if config.get("model_type") != "qwen3":
        raise ValueError(f"expected a text encoder of model_type 'qwen3', found {config.get('model_type')!r}")
    if config["num_hidden_layers"] < 2:
        raise ValueError(
            f"the text encoder leaves the last layer out, found num_hidden_layers = {config['num_hidden_layers']}; "
            "give a language model of two layers or more"
        )
    # No output matrix is ever made: as far as the text encoder goes, it is tied.
    fields = {"layers": config["num_hidden_layers"] - 1, "final_norm": False, "tied_embeddings": True}
    return TextEncoder(build_decoder(config, **(fields | options)))


def spelled(module: TextEncoder, names: Collection[str]) -> TextEncoder:
    """Returns the encoder with the names that a checkpoint's tensors have."""
    return module.clone(names="causal" if any(name.startswith(PREFIXES["causal"]) for name in names) else "base")


def describe(module: TextEncoder) -> dict[str, Any]:
    """Returns the Qwen3 config of the language model that the encoder is cut from."""
    config, architecture = describe_decoder(module.decoder), ARCHITECTURES[module.names]
    return config | {"architectures": [architecture], "num_hidden_layers": module.decoder.layers + 1}


def rows(module: TextEncoder) -> list[Row]:
    """Returns the name-mapping table, with what lies beyond the second-to-last layer as unused rows."""
    decoder, prefix = module.decoder, PREFIXES[module.names]
    table = decoder_rows(decoder, prefix, "decoder/")
    for row in layer_rows(decoder, f"{prefix}layers.{decoder.layers}", "unused/last_layer", layers=0):
        alike = row.target.replace("unused/last_layer", "decoder/layers")
        table.append(dataclasses.replace(row, like=alike))
    table.append(Row(f"{prefix}norm.weight", "unused/norm/scale", like="decoder/layers/attention_norm/scale"))
    return table
