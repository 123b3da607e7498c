"""Writing a Flax module as a Hugging Face checkpoint: the exact inverse of loading, streamed tensor by tensor."""

import collections
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from etils import epath

from npedit_jax import atomic
from npedit_jax.weights import kinds
from npedit_jax.weights.safetensors_io import CODES, Planned, split_shards, write_file
from npedit_jax.weights.table import Row, check_table, unused_shapes

MAX_SHARD_BYTES = 5_000_000_000  # of tensor data in one file
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")

# Of each source tensor: the rows that make it up, in order of their pieces, and the layer (None = not stacked).
Pieces = tuple[list[Row], int | None]


def save(
    kind: str,
    module: nn.Module,
    params: Mapping[str, Any],
    directory: epath.PathLike,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str | None = None,
) -> None:
    """Writes config.json and safetensors files (several with an index above `max_shard_bytes`) to a new directory.

    The directory appears whole or not at all: it is written under a temporary name and then renamed. In a run of
    several processes all must call this; the first one writes.

    Args:
      kind: a key of `KINDS`.
      params: nested dictionaries as `load` gives them, arrays sharded in any way. Tensors under "unused" (see `load`)
        are written back; without them the checkpoint lacks what our use of the network leaves out.
      directory: must not exist, or be empty.
      max_shard_bytes: of tensor data in one file.
      dtype: to convert parameters to ("bfloat16", ...); None keeps theirs.

    Raises:
      FileExistsError: the directory has content.
      ValueError: parameters and table do not match one to one; the message lists all that do not.
    """
    directory = epath.Path(directory)
    check_new(directory)
    planned, values = source_tensors(kind, module, params, dtype)
    shards = split_shards(planned, max_shard_bytes)
    if jax.process_index() == 0:
        _write(directory, kinds.KINDS[kind], kinds.kind_module(kind).describe(module), shards, values)
    else:
        # Gathering a sharded array is a collective: every process takes part, the first alone keeps the result.
        collections.deque(values, maxlen=0)


def source_tensors(
    kind: str, module: nn.Module, params: Mapping[str, Any], dtype: str | None = None
) -> tuple[list[Planned], Iterator[np.ndarray]]:
    """The Hugging Face tensors that parameters become, and their contents in the same order, made one at a time.

    Arguments and errors as of `save`.
    """
    flat = flax.traverse_util.flatten_dict(nn.unbox(dict(params)), sep="/")
    table = [row for row in kinds.kind_module(kind).rows(module) if not row.unused or row.target in flat]
    _check(kind, module, table, flat)
    tensors = _group(table)
    planned = [_plan(name, pieces, flat, dtype) for name, pieces in tensors.items()]
    return planned, (_value(tensors[tensor.name], flat, tensor.dtype) for tensor in planned)


def check_new(directory: epath.Path) -> None:
    """Raises FileExistsError where there is a file, or a directory with content."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not empty; give a new directory, or delete this one first")


def copy_tokenizer(source: epath.Path, directory: epath.Path) -> None:
    """Copies the tokenizer's files, as many as the source has, into the directory."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            (source / name).copy(directory / name)


def _check(kind: str, module: nn.Module, table: list[Row], flat: Mapping[str, Any]) -> None:
    shapes = kinds.parameter_shapes(kind, module)
    known = {row.target for row in table}
    problems = check_table(table, shapes)
    every = shapes | unused_shapes(table, shapes)
    problems += [f"missing: target {path} {list(shapes[path])}" for path in sorted(shapes.keys() - flat.keys())]
    problems += [
        f"unexpected: target {path} {list(flat[path].shape)} has no source" for path in sorted(flat.keys() - known)
    ]
    problems += [
        f"shape: target {path} {list(flat[path].shape)}, expected {list(every[path])}"
        for path in sorted(every.keys() & flat.keys())
        if flat[path].shape != every[path]
    ]
    if problems:
        raise ValueError(f"these parameters are not those of the {kind} module:\n  " + "\n  ".join(problems))


def _group(table: Iterable[Row]) -> dict[str, Pieces]:
    tensors = {}
    for row in table:
        for layer, name in enumerate(row.names()):
            tensors.setdefault(name, ([], layer if row.layers else None))[0].append(row)
    for rows, _ in tensors.values():
        rows.sort(key=lambda row: row.part)
    return tensors


def _plan(name: str, pieces: Pieces, flat: Mapping[str, Any], dtype: str | None) -> Planned:
    rows, layer = pieces
    array = flat[rows[0].target]
    stored = jax.numpy.dtype(dtype or array.dtype)
    if stored not in CODES:
        raise ValueError(f"{name}: safetensors has no dtype {stored}; known are {[str(d) for d in CODES]}")
    return Planned(name, stored, rows[0].source_shape(array.shape[0 if layer is None else 1 :]))


def _value(pieces: Pieces, flat: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    rows, layer = pieces
    arrays = [row.to_source(_to_host(flat[row.target], layer)) for row in rows]
    return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).astype(dtype, copy=False)


def _to_host(array: jax.Array | np.ndarray, layer: int | None) -> np.ndarray:
    """Returns the array, or one layer of it, on this process's host."""
    if isinstance(array, np.ndarray):
        return array if layer is None else array[layer]
    if array.is_fully_addressable:
        return np.asarray(array if layer is None else _layer(array, layer))
    everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    gathered = jax.jit(functools.partial(_layer, layer=layer), out_shardings=everywhere)(array)
    return np.asarray(gathered.addressable_data(0))


def _layer(array: jax.Array, layer: int | None) -> jax.Array:
    return array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


def _write(
    directory: epath.Path,
    stem: str,
    config: dict[str, Any],
    shards: list[list[Planned]],
    values: Iterator[np.ndarray],
) -> None:
    with atomic.directory(directory) as temporary:
        _write_json(temporary / "config.json", config)
        weight_map = {}
        for n, shard in enumerate(shards, start=1):
            suffix = f"-{n:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = temporary / f"{stem}{suffix}.safetensors"
            write_file(file, shard, (next(values) for _ in shard))
            weight_map |= {tensor.name: file.name for tensor in shard}
        if len(shards) > 1:
            total = sum(tensor.bytes for shard in shards for tensor in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(temporary / f"{stem}.safetensors.index.json", index)


def _write_json(file: epath.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
