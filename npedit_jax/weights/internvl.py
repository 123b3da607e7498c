"""InternVL 2.5 and 3 in both layouts on the Hub: OpenGVLab's own ("chat") and transformers' ("native").

A scorer of ours is described in the chat layout; what that layout has no word for stands under "npedit" in config.json.
"""

from typing import Any

from npedit_jax.models.scorer import Scorer, ShuffleProjector
from npedit_jax.models.vision import VisionTransformer
from npedit_jax.weights.language import build_decoder, check_fixed, decoder_rows, describe_decoder
from npedit_jax.weights.table import Row
from npedit_jax.weights.vision import LayerNames, conv_rows, dense_rows, layer_rows, norm_rows

# Settings that only one value of is built here, with that value, by layout and part of the config.
FIXED = {
    "chat": {"select_layer": -1, "ps_version": "v2"},
    "native": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    },
}
FIXED_VISION = {
    "chat": {"hidden_act": "gelu", "num_channels": 3},
    "native": {
        "hidden_act": "gelu",
        "num_channels": 3,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    },
}
# What the config files' vision part calls the switches of the attention.
BIAS = {"chat": "qkv_bias", "native": "attention_bias"}
QK_NORM = {"chat": "qk_normalization", "native": "use_qk_norm"}
NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
EMBEDDINGS = {
    "chat": {
        "patch": "vision_model.embeddings.patch_embedding",
        "class": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding",
        "layer": "vision_model.encoder.layers.{i}",
    },
    "native": {
        "patch": "vision_tower.embeddings.patch_embeddings.projection",
        "class": "vision_tower.embeddings.cls_token",
        "positions": "vision_tower.embeddings.position_embeddings",
        "layer": "vision_tower.encoder.layer.{i}",
    },
}
LAYER_NAMES = {
    "chat": LayerNames("attn.qkv", "attn.proj", "norm1", "norm2", ("ls1", "ls2"), "attn.q_norm", "attn.k_norm"),
    "native": LayerNames(
        "attention.{name}_proj",
        "attention.projection_layer",
        "layernorm_before",
        "layernorm_after",
        ("lambda_1", "lambda_2"),
        "attention.q_norm",
        "attention.k_norm",
    ),
}
LAYER_SCALE = 0.1  # initial value; the chat layout does not state it


def build(config: dict[str, Any], answer_ids: tuple[int, int] | None = None, **options: Any) -> Scorer:
    """Builds the scorer of an InternVL `config.json` in either layout.

    Args:
      answer_ids: token ids of (No, Yes); the file's own, if it has them, otherwise.
      options: fields of every part that the file does not hold: `dtype`, `param_dtype`, `remat`, `implementation`.

    Raises:
      ValueError: not an InternVL config, or one that asks for something the modules do not have.
    """
    names = _names(config)
    check_fixed(config, FIXED[names], "InternVL config")
    extra = config.get("npedit", {})
    ratio = config.get("downsample_ratio", 0.5)
    if not 0 < ratio <= 1 or (1 / ratio) % 1:
        raise ValueError(f"InternVL config has downsample_ratio = {ratio}; supported are 1, 1/2, 1/3, ...")
    language = build_decoder(_language_config(config, names), **options)
    types = {key: options[key] for key in ("dtype", "param_dtype") if key in options}
    answer_ids = answer_ids or extra.get("answer_ids")
    return Scorer(
        vision=build_vision(config["vision_config"], names, extra, **options),
        projector=ShuffleProjector(language.width, factor=round(1 / ratio), **types),
        language=language,
        answer_ids=tuple(answer_ids) if answer_ids else None,
        names=names,
        image_token_id=config.get("image_token_id"),
    )


def describe(module: Scorer) -> dict[str, Any]:
    """Returns the config of the scorer in its own layout, from which `build` makes the same network again.

    Raises:
      ValueError: a convolutional stem in the native layout, which has none.
    """
    names, language = module.names, describe_decoder(module.language)
    vision, extra = _describe_vision(module.vision, names)
    if module.answer_ids is not None:
        extra["answer_ids"] = list(module.answer_ids)
    config = {
        **FIXED[names],
        "downsample_ratio": 1 / module.projector.factor,
        "tie_word_embeddings": module.language.tied_embeddings,
        "vision_config": vision,
    }
    if names == "chat":
        language["architectures"] = ["Qwen3ForCausalLM" if module.language.qk_norm else "Qwen2ForCausalLM"]
        own = {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "force_image_size": module.vision.image_size,
            "template": "internvl2_5",
            "llm_config": language,
        }
    else:
        own = {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "image_seq_length": module.image_tokens,
            "text_config": language,
        }
        if module.image_token_id is not None:
            own["image_token_id"] = module.image_token_id
    return config | own | ({"npedit": extra} if extra else {})


def rows(module: Scorer) -> list[Row]:
    """Returns the name-mapping table of the scorer, in the layout that it came in."""
    table = vision_rows(module.vision, module.names)
    prefix, pieces = {
        "chat": ("mlp1.", ("0", "1", "3")),
        "native": ("multi_modal_projector.", ("layer_norm", "linear_1", "linear_2")),
    }[module.names]
    table += norm_rows(prefix + pieces[0], "projector/norm")
    for theirs, ours in zip(pieces[1:], ("up", "down"), strict=True):
        table += dense_rows(prefix + theirs, f"projector/{ours}")
    return table + decoder_rows(
        module.language, "language_model.model.", "language/", head="language_model.lm_head.weight"
    )


def _describe_vision(vision: VisionTransformer, names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the config's vision part, and what of the tower has to stand under "npedit"."""
    extra = {}
    config = {
        "model_type": "intern_vit_6b" if names == "chat" else "internvl_vision",
        **FIXED_VISION[names],
        "hidden_size": vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.mlp_width,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "layer_norm_eps": vision.epsilon,
        "norm_type": {ours: theirs for theirs, ours in NORMS.items()}[vision.norm],
        BIAS[names]: vision.qkv_bias,
        QK_NORM[names]: vision.qk_norm,
    }
    if names == "native":
        if vision.stem:
            raise ValueError("transformers' InternVL has no convolutional stem; describe the scorer with names='chat'")
        config |= {key: [config[key]] * 2 for key in ("patch_size", "image_size")}
        config["layer_scale_init_value"] = vision.layer_scale
        return config, extra
    if vision.stem:
        extra["stem"] = list(vision.stem)
    if vision.layer_scale != LAYER_SCALE:
        extra["layer_scale"] = vision.layer_scale
    return config, extra


def _names(config: dict[str, Any]) -> str:
    layouts = {"internvl_chat": "chat", "internvl": "native"}
    model_type = config.get("model_type")
    if model_type not in layouts:
        raise ValueError(f"expected a scorer of model_type {' or '.join(map(repr, layouts))}, found {model_type!r}")
    return layouts[model_type]


def _language_config(config: dict[str, Any], names: str) -> dict[str, Any]:
    language = dict(config["llm_config" if names == "chat" else "text_config"])
    # OpenGVLab's files name the architecture, and leave the type out in some.
    architecture = (language.get("architectures") or [""])[0]
    if "model_type" not in language and architecture:
        language["model_type"] = architecture.removesuffix("ForCausalLM").lower()
    language.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return language


def build_vision(config: dict[str, Any], names: str, extra: dict[str, Any], **options: Any) -> VisionTransformer:
    """Builds the vision tower of a `vision_config` and of what stands under "npedit"; raises ValueError as `build`."""
    check_fixed(config, FIXED_VISION[names], "InternVL vision config")
    sides = {key: config[key] for key in ("image_size", "patch_size")}
    for key, side in sides.items():
        if isinstance(side, list | tuple):
            if side[0] != side[1]:
                raise ValueError(f"InternVL vision config has {key} = {list(side)}; only squares are supported")
            sides[key] = side[0]
    norm = config.get("norm_type", "rms_norm" if names == "chat" else "layer_norm")
    if norm not in NORMS:
        raise ValueError(f"InternVL vision config has norm_type = {norm!r}; supported: {list(NORMS)}")
    layer_scale = extra.get("layer_scale", config.get("layer_scale_init_value", LAYER_SCALE))
    if layer_scale is None:
        raise ValueError("InternVL's vision tower always scales its layers; found layer_scale = None, give a number")
    return VisionTransformer(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        epsilon=config.get("layer_norm_eps", 1e-6),
        norm=NORMS[norm],
        qkv_bias=config.get(BIAS[names], False),
        qk_norm=config.get(QK_NORM[names], False),
        layer_scale=layer_scale,
        stem=tuple(extra.get("stem", ())),
        **sides,
        **options,
    )


def vision_rows(vision: VisionTransformer, names: str) -> list[Row]:
    """Returns the rows of the vision tower alone, in either layout."""
    embeddings = EMBEDDINGS[names]
    table = conv_rows(embeddings["patch"], "vision/patch_embedding")
    table.append(Row(embeddings["class"], "vision/class_token", "leading"))
    table.append(Row(embeddings["positions"], "vision/positions", "leading"))
    for index in range(len(vision.stem)):
        table += conv_rows(f"vision_model.embeddings.stem.{index}", f"vision/stem_{index}")
    return table + layer_rows(vision, embeddings["layer"], "vision/layers", LAYER_NAMES[names])
