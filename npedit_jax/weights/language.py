"""Qwen2, Qwen2.5 and Qwen3 decoders in transformers' layout: what the text encoder and the scorers share."""

from typing import Any

from npedit_jax.models.language import Decoder
from npedit_jax.weights.table import Row

# Settings that only one value of is built here, with that value. Sliding windows are refused where they are in use.
FIXED = {"hidden_act": "silu", "use_sliding_window": False}
# A dynamic rotary embedding equals the plain one up to `max_position_embeddings` tokens, far above our sequences.
ROPE_TYPES = ("default", "dynamic")


def build_decoder(config: dict[str, Any], **options: Any) -> Decoder:
    """Builds the decoder of a Qwen2 or Qwen3 config (`config.json`, `text_config` or `llm_config`).

    Args:
      config: a value that is absent takes transformers' default; `rope_theta` is read at the top level (checkpoints)
        or under `rope_parameters` (transformers 5).
      options: fields of `Decoder` that the file does not hold (`dtype`, `remat`, ...), or overrides.

    Raises:
      ValueError: the config asks for another architecture, activation, sliding window or rotary scaling.
    """
    model_type = config.get("model_type", "qwen2")
    if model_type not in ("qwen2", "qwen3"):
        raise ValueError(f"expected a language model of type qwen2 or qwen3, found {model_type!r}; it is not supported")
    check_fixed(config, FIXED, "language config")
    is_qwen3 = model_type == "qwen3"
    if is_qwen3 and config.get("attention_bias"):
        raise ValueError("language config has attention_bias = True; Qwen3 decoders are supported without it only")
    heads = config["num_attention_heads"]
    fields = {
        "vocabulary": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        # Qwen3 states its head width and defaults to 128; Qwen2's is the width split over the heads.
        "head_width": config.get("head_dim") or (128 if is_qwen3 else config["hidden_size"] // heads),
        "mlp_width": config["intermediate_size"],
        "rope_theta": _rope_theta(config),
        "epsilon": config.get("rms_norm_eps", 1e-6),
        "qkv_bias": not is_qwen3,
        "qk_norm": is_qwen3,
        "tied_embeddings": config.get("tie_word_embeddings", False),
    }
    return Decoder(**(fields | options))


def describe_decoder(module: Decoder) -> dict[str, Any]:
    """Returns the transformers config of the decoder, from which `build_decoder` makes the same network again.

    Raises:
      ValueError: neither Qwen2 (`qkv_bias`, no `qk_norm`) nor Qwen3 (`qk_norm`, no `qkv_bias`).
    """
    if module.qkv_bias == module.qk_norm:
        raise ValueError(
            f"a decoder with qkv_bias={module.qkv_bias} and qk_norm={module.qk_norm} is neither Qwen2 (bias, no norm) "
            "nor Qwen3 (norm, no bias); it has no Hugging Face config"
        )
    if not module.qk_norm and module.head_width * module.heads != module.width:
        raise ValueError(
            f"Qwen2 splits its width over its heads, found width {module.width}, {module.heads} heads of "
            f"{module.head_width}; choose head_width = width / heads"
        )
    return {
        "model_type": "qwen3" if module.qk_norm else "qwen2",
        **FIXED,
        **({"attention_bias": False} if module.qk_norm else {}),
        "vocab_size": module.vocabulary,
        "hidden_size": module.width,
        "num_hidden_layers": module.layers,
        "num_attention_heads": module.heads,
        "num_key_value_heads": module.kv_heads,
        "head_dim": module.head_width,
        "intermediate_size": module.mlp_width,
        "max_position_embeddings": 32768,
        # Both spellings: transformers 5 reads the first, older versions the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": module.rope_theta},
        "rope_theta": module.rope_theta,
        "rms_norm_eps": module.epsilon,
        "tie_word_embeddings": module.tied_embeddings,
    }


def check_fixed(config: dict[str, Any], fixed: dict[str, Any], what: str) -> None:
    """Raises ValueError where the config states another value than the only one that is supported."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"{what} has {key} = {config[key]!r}; only {value!r} is supported")


def layer_rows(module: Decoder, source: str, target: str, layers: int) -> list[Row]:
    """Returns the rows of one decoder layer (`layers=0`) or of a stack (`source` then holds "{i}")."""
    projections = ["query", "key", "value"]
    table = [
        Row(f"{source}.self_attn.{name[0]}_proj.weight", f"{target}/attention/{name}/kernel", "dense", layers)
        for name in projections
    ]
    if module.qkv_bias:
        table += [
            Row(f"{source}.self_attn.{name[0]}_proj.bias", f"{target}/attention/{name}/bias", "copy", layers)
            for name in projections
        ]
    table.append(Row(f"{source}.self_attn.o_proj.weight", f"{target}/attention/output/kernel", "dense", layers))
    if module.qk_norm:
        table += [
            Row(f"{source}.self_attn.{name[0]}_norm.weight", f"{target}/attention/{name}_norm/scale", "copy", layers)
            for name in ("query", "key")
        ]
    table += [
        Row(f"{source}.mlp.{name}_proj.weight", f"{target}/mlp/{name}/kernel", "dense", layers)
        for name in ("gate", "up", "down")
    ]
    table += [
        Row(f"{source}.{theirs}.weight", f"{target}/{ours}/scale", "copy", layers)
        for theirs, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm"))
    ]
    return table


def decoder_rows(module: Decoder, source: str = "", target: str = "", head: str = "lm_head.weight") -> list[Row]:
    """Returns the rows of a whole decoder.

    Args:
      source: prefix of the Hugging Face names up to `embed_tokens`, with its dot ("model.").
      target: prefix of our paths, with its slash ("language/").
      head: Hugging Face name of the output matrix, which a file may hold although it is tied to the embedding.
    """
    table = [Row(f"{source}embed_tokens.weight", f"{target}embedding/embedding")]
    table += layer_rows(module, f"{source}layers.{{i}}", f"{target}layers", module.layers)
    if module.final_norm:
        table.append(Row(f"{source}norm.weight", f"{target}norm/scale"))
    if module.tied_embeddings:
        table.append(Row(head, "unused/unembedding/embedding", like=f"{target}embedding/embedding"))
    else:
        table.append(Row(head, f"{target}unembedding/kernel", "dense"))
    return table


def _rope_theta(config: dict[str, Any]) -> float:
    """Reads the rotary base where either generation of config files keeps it."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"language config scales its rotary embedding by {kind!r}; supported: {list(ROPE_TYPES)}")
    return float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
