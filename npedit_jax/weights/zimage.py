"""The Z-Image denoiser's weights in diffusers' layout (`ZImageTransformer2DModel`).

A denoiser with options that diffusers does not know carries them in its config.json as one object, "npedit"; diffusers
ignores it, so a network that needs them is reproduced by this package only.
"""

import dataclasses
from typing import Any

from npedit_jax.models.denoiser import Denoiser
from npedit_jax.weights.table import Row

# Settings of `ZImageTransformer2DModel` that only one value of is built here, with that value.
FIXED = {"all_f_patch_size": [1], "qk_norm": True, "siglip_feat_dim": None}
# Module field of each setting, and the default that diffusers gives it.
FIELDS = {
    "in_channels": ("channels", 16),
    "dim": ("width", 3840),
    "n_layers": ("depth", 30),
    "n_refiner_layers": ("refiner_depth", 2),
    "n_heads": ("heads", 30),
    "norm_eps": ("epsilon", 1e-5),
    "cap_feat_dim": ("text_width", 2560),
    "rope_theta": ("rope_theta", 256.0),
    "t_scale": ("time_scale", 1000.0),
    "axes_dims": ("rope_widths", (32, 48, 48)),
    "axes_lens": ("rope_lengths", (1024, 512, 512)),
}
# Fields that change what the network computes and that diffusers has no setting for.
OPTIONS = ("pad_multiple", "pad_tokens", "prediction", "position_embedding")


def build(config: dict[str, Any], **options: Any) -> Denoiser:
    """Builds the module of a diffusers `ZImageTransformer2DModel` config.json; absent keys take diffusers' defaults.

    Args:
      options: module fields that the file does not hold (`dtype`, `remat`, ...), or overrides.

    Raises:
      ValueError: the config asks for something that the module does not have.
    """
    for key, value in FIXED.items():
        if _tuples(config.get(key, value)) != _tuples(value):
            raise ValueError(f"denoiser config has {key} = {config[key]!r}; only {value!r} is supported")
    patch_sizes = config.get("all_patch_size", [2])
    if len(patch_sizes) != 1:
        raise ValueError(f"denoiser config has all_patch_size = {patch_sizes!r}; exactly one size is supported")
    extra = config.get("npedit", {})
    if unknown := sorted(set(extra) - set(OPTIONS)):
        raise ValueError(f'denoiser config has unknown "npedit" options {unknown}; known are {list(OPTIONS)}')
    fields = {field: _tuples(config.get(key, default)) for key, (field, default) in FIELDS.items()}
    return Denoiser(**({"patch_size": patch_sizes[0]} | fields | extra | options))


def describe(module: Denoiser) -> dict[str, Any]:
    """Returns the diffusers config.json of the module, from which `build` makes the same network again."""
    values = {key: getattr(module, field) for key, (field, _) in FIELDS.items()}
    config = {
        "_class_name": "ZImageTransformer2DModel",
        **FIXED,
        "all_patch_size": [module.patch_size],
        # Stored but never read by diffusers: every head has its own key and value.
        "n_kv_heads": module.heads,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()},
    }
    defaults = {field.name: field.default for field in dataclasses.fields(Denoiser)}
    extra = {name: getattr(module, name) for name in OPTIONS if getattr(module, name) != defaults[name]}
    return config | ({"npedit": extra} if extra else {})


def rows(module: Denoiser) -> list[Row]:
    """Returns the name-mapping table of the module."""
    size = f"{module.patch_size}-1"
    table = _dense(f"all_x_embedder.{size}", "patch_embedding")
    table += _dense("t_embedder.mlp.0", "time_embedding/hidden")
    table += _dense("t_embedder.mlp.2", "time_embedding/out")
    table.append(Row("cap_embedder.0.weight", "caption_norm/scale"))
    table += _dense("cap_embedder.1", "caption_projection")
    table += [Row(name, name) for name in ("x_pad_token", "cap_pad_token")]
    table += _block("noise_refiner", module.refiner_depth)
    table += _block("context_refiner", module.refiner_depth, modulated=False)
    table += _block("layers", module.depth)
    table += _dense(f"all_final_layer.{size}.adaLN_modulation.1", "final/modulation")
    table += _dense(f"all_final_layer.{size}.linear", "final/projection")
    return table


def _block(name: str, layers: int, modulated: bool = True) -> list[Row]:
    if not layers:
        return []
    source = name + ".{i}"
    table = []
    for theirs, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
        table += _dense(f"{source}.attention.{theirs}", f"{name}/attention/{ours}", layers, bias=False)
    for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        table += _dense(f"{source}.feed_forward.{theirs}", f"{name}/mlp/{ours}", layers, bias=False)
    for theirs, ours in (
        ("attention.norm_q", "attention/query_norm"),
        ("attention.norm_k", "attention/key_norm"),
        ("attention_norm1", "attention_norm"),
        ("attention_norm2", "attention_out_norm"),
        ("ffn_norm1", "mlp_norm"),
        ("ffn_norm2", "mlp_out_norm"),
    ):
        table.append(Row(f"{source}.{theirs}.weight", f"{name}/{ours}/scale", layers=layers))
    if modulated:
        table += _dense(f"{source}.adaLN_modulation.0", f"{name}/modulation", layers)
    return table


def _dense(source: str, target: str, layers: int = 0, bias: bool = True) -> list[Row]:
    table = [Row(f"{source}.weight", f"{target}/kernel", "dense", layers)]
    return table + ([Row(f"{source}.bias", f"{target}/bias", layers=layers)] if bias else [])


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
