"""Adapters (LoRA) as files: one safetensors file under the names of PEFT, as `load_lora_weights` of diffusers reads it.

A layer's pair is `<prefix>.<layer>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank], one of each for every
layer of a stack. The scale alpha / rank is multiplied into B, so that a file means the same to every reader: those that
find no alpha take it to be the rank.
"""

from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from npedit_jax.models import lora
from npedit_jax.weights import kinds

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."  # of the denoiser's layers in a diffusers pipeline
PAIR = {"a": "lora_A", "b": "lora_B"}


def to_peft(
    kind: str, module: nn.Module, adapters: lora.Adapters, alpha: float, prefix: str = PREFIX
) -> dict[str, np.ndarray]:
    """Adapters by their PEFT names, float32, one tensor per layer.

    Args:
      kind: of the network, a key of `weights.KINDS`.
      module: that the adapters lie on.
      prefix: of every name; "base_model.model." is PEFT's own.

    Raises:
      ValueError: adapters of a layer that the mapping table of the kind does not have.
    """
    flat = flax.traverse_util.flatten_dict(lora.scaled(adapters, alpha), sep="/")
    names = _layer_names(kind, module)
    tensors = {}
    for path, leaf in flat.items():
        layer, _, part = path.rpartition("/")
        if layer not in names:
            raise ValueError(f"adapters of {layer!r} have no name in the table of {kind!r}; it has {sorted(names)}")
        values = np.asarray(leaf, np.float32)
        for name, value in zip(names[layer], values if values.ndim == 3 else values[None], strict=True):
            tensors[f"{prefix}{name}.{PAIR[part]}.weight"] = np.ascontiguousarray(value.T)
    return tensors


def save(directory: epath.PathLike, kind: str, module: nn.Module, adapters: lora.Adapters, alpha: float) -> epath.Path:
    """Writes the adapters to `directory`; returns the file.

    Raises:
      FileExistsError: it is there already.
    """
    file = epath.Path(directory) / FILE
    if file.exists():
        raise FileExistsError(f"{file} exists; take another directory")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(safetensors.numpy.save(to_peft(kind, module, adapters, alpha), metadata={"format": "pt"}))
    return file


def load(
    directory: epath.PathLike, kind: str, module: nn.Module, *, like: lora.Adapters, alpha: float, prefix: str = PREFIX
) -> lora.Adapters:
    """Reads adapters into the tree and shapes of `like`, for use with this alpha.

    Raises:
      FileNotFoundError: no such file.
      ValueError: tensors that do not match one to one; the message lists them.
    """
    file = epath.Path(directory) / FILE
    if not file.exists():
        raise FileNotFoundError(f"{directory} holds no adapters: it has no {FILE}")
    tensors = safetensors.numpy.load(file.read_bytes())
    expected = {name: value.shape for name, value in to_peft(kind, module, like, alpha, prefix).items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is unexpected" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} is {tensors[name].shape}, expected {expected[name]}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name]
    ]
    if problems:
        raise ValueError(f"{file} does not fit the adapters of this config:\n  " + "\n  ".join(problems))
    names = _layer_names(kind, module)
    flat = {}
    for path, leaf in flax.traverse_util.flatten_dict(like, sep="/").items():
        layer, _, part = path.rpartition("/")
        found = [tensors[f"{prefix}{name}.{PAIR[part]}.weight"].T for name in names[layer]]
        value = np.stack(found) if leaf.ndim == 3 else found[0]
        flat[path] = jnp.asarray(value * (leaf.shape[-2] / alpha if part == "b" else 1.0), jnp.float32)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _layer_names(kind: str, module: nn.Module) -> dict[str, list[str]]:
    """The original's names of every linear layer, one per layer of a stack, by our path."""
    rows: list[Any] = kinds.kind_module(kind).rows(module)
    return {
        row.target.removesuffix("/kernel"): [name.removesuffix(".weight") for name in row.names()]
        for row in rows
        if row.target.endswith("/kernel") and row.layout == "dense" and row.parts == 1
    }
