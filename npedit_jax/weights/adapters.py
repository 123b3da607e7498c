"""Adapters (LoRA) as files: a directory as PEFT keeps it, which `peft.PeftModel.from_pretrained` lays on the original.

`adapter_config.json` has the rank, alpha and the names of all adapted layers; `adapter_model.safetensors` has a pair
for each of them, `base_model.model.<layer>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank], those of a stack
one by one.
"""

import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from etils import epath

from npedit_jax import atomic
from npedit_jax.models import lora
from npedit_jax.weights import kinds, saving
from npedit_jax.weights.safetensors_io import Entry, Planned, Reader, read_header, refuse_pickles, write_file

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, of every layer of the model that it wraps
PAIR = {"a": "lora_A", "b": "lora_B"}
# Settings of PEFT under which a pair means something else than `x W + alpha / rank (x A) B`.
PLAIN = ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern")


def to_peft(kind: str, module: nn.Module, adapters: lora.Adapters) -> dict[str, np.ndarray]:
    """Adapters by their PEFT names, float32, one tensor per layer.

    Args:
      kind: of the network, a key of `weights.KINDS`.
      module: that the adapters lie on.

    Raises:
      ValueError: adapters of a layer that the mapping table of the kind does not have.
    """
    names = _layer_names(kind, module)
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(adapters, sep="/").items():
        layer, _, part = path.rpartition("/")
        if layer not in names:
            raise ValueError(f"adapters of {layer!r} have no name in the table of {kind!r}; it has {sorted(names)}")
        values = np.asarray(leaf, np.float32)
        for name, value in zip(names[layer], values if values.ndim == 3 else values[None], strict=True):
            tensors[f"{PREFIX}{name}.{PAIR[part]}.weight"] = np.ascontiguousarray(value.T)
    return tensors


def save(
    directory: epath.PathLike,
    kind: str,
    module: nn.Module,
    adapters: lora.Adapters,
    alpha: float,
    *,
    base: str = "",
    dtype: str = "float32",
) -> None:
    """Writes the adapters to a new directory, which appears whole or not at all.

    Args:
      base: where the weights that they lie on come from, for PEFT's record.
      dtype: to store them in.

    Raises:
      FileExistsError: the directory has content.
      ValueError: as `to_peft`.
    """
    directory = epath.Path(directory)
    saving.check_new(directory)
    stored = jnp.dtype(dtype)
    tensors = {name: value.astype(stored) for name, value in to_peft(kind, module, adapters).items()}
    planned = [Planned(name, stored, value.shape) for name, value in tensors.items()]
    layers = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    rank = next(value.shape[0] for name, value in tensors.items() if name.endswith("lora_A.weight"))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": layers,
        "bias": "none",
        "inference_mode": True,
    }
    with atomic.directory(directory) as temporary:
        write_file(temporary / FILE, planned, iter(tensors.values()))
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(
    directory: epath.PathLike, kind: str, module: nn.Module, *, like: lora.Adapters, alpha: float
) -> lora.Adapters:
    """Reads adapters into the tree and shapes of `like`, for use with this alpha, whichever they were saved with.

    Raises:
      FileNotFoundError: no such files.
      ValueError: tensors that do not match one to one, all of which the message lists, another kind of adapter, or
        damaged files.
    """
    directory = epath.Path(directory)
    refuse_pickles(directory)
    for name in (CONFIG, FILE):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory} holds no adapters: it has no {name}")
    stored_scale = _scale(directory / CONFIG)
    entries = read_header(directory / FILE)
    _check(directory / FILE, entries, to_peft(kind, module, like))
    names = _layer_names(kind, module)
    flat = {}
    with Reader() as reader:
        for path, leaf in flax.traverse_util.flatten_dict(like, sep="/").items():
            layer, _, part = path.rpartition("/")
            stored = [reader.read(entries[f"{PREFIX}{name}.{PAIR[part]}.weight"]) for name in names[layer]]
            found = [value.astype(np.float32).T for value in stored]
            value = np.stack(found) if leaf.ndim == 3 else found[0]
            rescale = stored_scale * leaf.shape[-2] / alpha if part == "b" else 1.0
            flat[path] = jnp.asarray(value * rescale, jnp.float32)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _scale(file: epath.Path) -> float:
    """What PEFT multiplies the product of a pair with, alpha / rank, having checked that it does no more."""
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} holds no settings of adapters: {error}") from error
    if config.get("peft_type") != "LORA" or any(config.get(name) for name in PLAIN):
        found = {name: config[name] for name in ("peft_type", *PLAIN) if config.get(name)}
        raise ValueError(f"{file} is of other adapters than plain LoRA: {found}; train it without these")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0):
        raise ValueError(f"{file}: expected numbers r and lora_alpha, found r={rank!r} and lora_alpha={alpha!r}")
    return alpha / rank


def _check(file: epath.Path, tensors: Mapping[str, Entry], like: Mapping[str, np.ndarray]) -> None:
    problems = [f"{name} is missing" for name in sorted(like.keys() - tensors.keys())]
    problems += [f"{name} is unexpected" for name in sorted(tensors.keys() - like.keys())]
    problems += [
        f"{name} is {tensors[name].shape}, expected {like[name].shape}"
        for name in sorted(like.keys() & tensors.keys())
        if tensors[name].shape != like[name].shape
    ]
    if problems:
        raise ValueError(f"{file} does not fit the adapters of this config:\n  " + "\n  ".join(problems))


def _layer_names(kind: str, module: nn.Module) -> dict[str, list[str]]:
    """The original's names of every linear layer, one per layer of a stack, by our path."""
    rows: list[Any] = kinds.kind_module(kind).rows(module)
    return {
        row.target.removesuffix("/kernel"): [name.removesuffix(".weight") for name in row.names()]
        for row in rows
        if row.target.endswith("/kernel") and row.layout == "dense" and row.parts == 1
    }
