"""The config.json of published checkpoints that the full-size configs name.

With these a full-size program can be shaped, counted and compiled on a machine that has no weights.
"""

from typing import Any

ZIMAGE = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


# No and Yes in Qwen's vocabulary. Loading a checkpoint reads them from its tokenizer.
ANSWERS = {"answer_ids": [2753, 9454]}


def _qwen2(vocabulary: int, width: int, layers: int, heads: int, kv_heads: int, mlp_width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    }


INTERNVIT_300M = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 448,
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "hidden_act": "gelu",
    "qkv_bias": True,
    "qk_normalization": False,
}
INTERNVIT_6B = INTERNVIT_300M | {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
}


def _internvl3(vision: dict[str, Any], *language: int) -> dict[str, Any]:
    """InternVL3: a vision tower and a Qwen2.5 of (width, layers, heads, kv_heads, mlp_width)."""
    return {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "vision_config": vision,
        "llm_config": _qwen2(151674, *language) | {"architectures": ["Qwen2ForCausalLM"]},
        "npedit": ANSWERS,
    }


LLAVA_ONEVISION_7B = {
    "model_type": "llava_onevision",
    "vision_config": {
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 384,
        "vision_use_head": False,
    },
    "text_config": _qwen2(152000, 3584, 28, 28, 4, 18944),
    "npedit": ANSWERS,
}
# By the end of the path of a directory that holds the checkpoint.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Z-Image/transformer": ZIMAGE,
    "Z-Image/vae": AUTOENCODER,
    "Z-Image/text_encoder": QWEN3_4B,
    "InternVL3-1B": _internvl3(INTERNVIT_300M, 896, 24, 14, 2, 4864),
    "InternVL3-2B": _internvl3(INTERNVIT_300M, 1536, 28, 12, 2, 8960),
    "InternVL3-8B": _internvl3(INTERNVIT_300M, 3584, 28, 28, 4, 18944),
    "InternVL3-14B": _internvl3(INTERNVIT_300M, 5120, 48, 40, 8, 13824),
    "InternVL3-38B": _internvl3(INTERNVIT_6B, 5120, 64, 40, 8, 27648),
    "InternVL3-78B": _internvl3(INTERNVIT_6B, 8192, 80, 64, 8, 29568),
    "llava-onevision-qwen2-7b-ov-hf": LLAVA_ONEVISION_7B,
}


def architecture(directory: str) -> dict[str, Any] | None:
    """The config.json of the published checkpoint whose name the path ends with, None for any other path."""
    for name, config in ARCHITECTURES.items():
        if f"/{directory.rstrip('/')}".endswith(f"/{name}"):
            return config
    return None
