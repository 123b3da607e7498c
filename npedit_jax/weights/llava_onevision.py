"""LLaVA-OneVision in transformers' layout (`LlavaOnevisionForConditionalGeneration`): SigLIP and Qwen2.

The scorer reads SigLIP's last layer before its final norm, which is therefore an unused row of the table.
"""

from collections.abc import Collection
from typing import Any

from npedit_jax.models.image_preparation import SIGLIP
from npedit_jax.models.scorer import NewlineProjector, Scorer
from npedit_jax.models.vision import VisionTransformer
from npedit_jax.weights.language import build_decoder, check_fixed, decoder_rows, describe_decoder
from npedit_jax.weights.table import Row
from npedit_jax.weights.vision import LayerNames, conv_rows, dense_rows, layer_rows

# Settings that only one value of is built here, with that value.
FIXED = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
FIXED_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "num_channels": 3,
    "vision_use_head": False,
}
ASPECT_RATIO = "anyres_max_"  # followed by the most tiles whose tokens are kept
# What the names of the tower's tensors begin with, by `Scorer.names`: nested before transformers 5.
TOWERS = {"native": "vision_tower.", "nested": "vision_tower.vision_model."}
LAYER_NAMES = LayerNames("self_attn.{name}_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2")


def build(config: dict[str, Any], answer_ids: tuple[int, int] | None = None, **options: Any) -> Scorer:
    """Builds the scorer of a LLaVA-OneVision `config.json`.

    Args:
      answer_ids: token ids of (No, Yes); the file's own, if it has them, otherwise.
      options: fields of every part that the file does not hold: `dtype`, `param_dtype`, `remat`, `implementation`.

    Raises:
      ValueError: not a LLaVA-OneVision config, or one that asks for something the modules do not have.
    """
    if config.get("model_type") != "llava_onevision":
        raise ValueError(f"expected a scorer of model_type 'llava_onevision', found {config.get('model_type')!r}")
    check_fixed(config, FIXED, "LLaVA-OneVision config")
    text = dict(config["text_config"])
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    language = build_decoder(text, **options)
    types = {key: options[key] for key in ("dtype", "param_dtype") if key in options}
    answer_ids = answer_ids or config.get("npedit", {}).get("answer_ids")
    return Scorer(
        vision=build_vision(config["vision_config"], **options),
        projector=NewlineProjector(
            language.width,
            resolutions=tuple(tuple(size) for size in config.get("image_grid_pinpoints", ())),
            max_tiles=_max_tiles(config),
            **types,
        ),
        language=language,
        answer_ids=tuple(answer_ids) if answer_ids else None,
        pixel_mean=SIGLIP[0],
        pixel_deviation=SIGLIP[1],
        names="native",
        image_token_id=config.get("image_token_id", config.get("image_token_index")),
    )


def build_vision(config: dict[str, Any], **options: Any) -> VisionTransformer:
    """Builds SigLIP from a scorer's `vision_config`; raises ValueError as `build`."""
    check_fixed(config, FIXED_VISION, "LLaVA-OneVision vision config")
    return VisionTransformer(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        patch_size=config["patch_size"],
        image_size=config["image_size"],
        epsilon=config.get("layer_norm_eps", 1e-6),
        activation="gelu_tanh",
        class_token=False,
        layer_scale=None,
        **options,
    )


def describe(module: Scorer) -> dict[str, Any]:
    """Returns the LLaVA-OneVision config of the scorer, from which `build` makes the same network again."""
    vision, projector = module.vision, module.projector
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        **FIXED,
        "image_grid_pinpoints": [list(size) for size in projector.resolutions],
        "vision_aspect_ratio": f"{ASPECT_RATIO}{projector.max_tiles}",
        "tie_word_embeddings": module.language.tied_embeddings,
        "text_config": describe_decoder(module.language),
        "vision_config": {
            **FIXED_VISION,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "layer_norm_eps": vision.epsilon,
        },
    }
    if module.image_token_id is not None:
        config["image_token_index"] = module.image_token_id  # the name in published files
    if module.answer_ids is not None:
        config["npedit"] = {"answer_ids": list(module.answer_ids)}
    return config


def spelled(module: Scorer, names: Collection[str]) -> Scorer:
    """Returns the scorer with the names that a checkpoint's tensors have."""
    nested = any(name.startswith(TOWERS["nested"]) for name in names)
    return module.clone(names="nested" if nested else "native")


def rows(module: Scorer) -> list[Row]:
    """Returns the name-mapping table of the scorer, SigLIP's final norm as unused rows."""
    tower = TOWERS[module.names]
    table = vision_rows(module.vision, tower)
    for theirs, ours in (("weight", "scale"), ("bias", "bias")):
        alike = f"vision/layers/mlp_norm/{ours}"
        table.append(Row(f"{tower}post_layernorm.{theirs}", f"unused/vision_norm/{ours}", like=alike))
    table += dense_rows("multi_modal_projector.linear_1", "projector/up")
    table += dense_rows("multi_modal_projector.linear_2", "projector/down")
    table.append(Row("image_newline", "projector/newline"))
    return table + decoder_rows(
        module.language, "language_model.model.", "language/", head="language_model.lm_head.weight"
    )


def vision_rows(vision: VisionTransformer, tower: str = TOWERS["native"]) -> list[Row]:
    """Returns the rows of the vision tower alone, whose names begin with `tower`."""
    table = conv_rows(f"{tower}embeddings.patch_embedding", "vision/patch_embedding")
    table.append(Row(f"{tower}embeddings.position_embedding.weight", "vision/positions"))
    return table + layer_rows(vision, f"{tower}encoder.layers.{{i}}", "vision/layers", LAYER_NAMES)


def _max_tiles(config: dict[str, Any]) -> int:
    aspect_ratio = config.get("vision_aspect_ratio", f"{ASPECT_RATIO}9")
    count = aspect_ratio.removeprefix(ASPECT_RATIO)
    if count == aspect_ratio or not count.isdigit():
        raise ValueError(
            f"LLaVA-OneVision config has vision_aspect_ratio = {aspect_ratio!r}; expected {ASPECT_RATIO!r} and a number"
        )
    return int(count)
