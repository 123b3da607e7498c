"""Reading a checkpoint into a Flax module: strict, tensor by tensor, each placed as it is read."""

import collections
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from etils import epath

from npedit_jax.data.tokenize import answer_id, read_tokenizer
from npedit_jax.weights import converted, kinds
from npedit_jax.weights.safetensors_io import Entry, Reader, index_directory, refuse_pickles
from npedit_jax.weights.table import Row, check_table, unused_shapes

Shardings = jax.sharding.Sharding | Callable[[str], jax.sharding.Sharding] | Mapping[str, Any] | None
ALIGNMENT = 64  # bytes; XLA's CPU client takes a buffer so aligned as its own instead of copying it
TOKENIZERS = ("tokenizer.json", "vocab.json")


def load(
    kind: str,
    directory: epath.PathLike,
    dtype: str | None = "float32",
    shardings: Shardings = None,
    keep_unused: bool = False,
    compute_dtype: Any = None,
    **module_options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the module that a checkpoint's config.json describes and loads its weights.

    One tensor is in host memory at a time, or, of a stacked parameter, one layer and the part of the stack that the
    devices of this process hold. A converted directory (`npedit_jax.convert`) is known by its layout and read through
    Orbax.

    Args:
      kind: a key of `KINDS`.
      directory: holds config.json and *.safetensors, one file or shards, or is a converted one; any path `etils.epath`
        knows.
      dtype: of the parameters ("float32", "bfloat16", ...); None keeps each as it is stored, a stack of layers
        stored in several types in the smallest that holds them all.
      shardings: where parameters go: a tree like the parameters', a function of the "/"-joined path, one sharding for
        all, or None for the default device.
      keep_unused: keep the tensors that our use leaves out, as stored in NumPy arrays on the host under
        `params["unused"]`; modules ignore them, `save` writes them back. A converted directory has none.
      compute_dtype: the module's `dtype`; None leaves the module's default.
      module_options: further fields of the module (`remat`, ...), see `build` of the kind.

    Returns:
      The module, and its parameters as nested dictionaries.

    Raises:
      FileNotFoundError: config.json, weights or a shard are missing.
      ValueError: pickled or damaged files; an unsupported config; or tensors and parameters that do not match one to
        one, in which case the message lists *all* missing, unexpected, duplicate and wrongly shaped tensors;
        `keep_unused` of a converted directory.
    """
    directory = epath.Path(directory)
    refuse_pickles(directory)
    module = _build_module(kind, directory, compute_dtype, module_options)
    if converted.is_converted(directory):
        return module, _read_converted(kind, module, directory, dtype, shardings, keep_unused)
    entries, faults_of_files = index_directory(directory)
    module = kinds.spelled(kind, module, entries)
    table = kinds.kind_module(kind).rows(module)
    shapes = kinds.parameter_shapes(kind, module)
    if faults := check_table(table, shapes):
        raise ValueError(f"the mapping table of {kind} does not fit its module:\n  " + "\n  ".join(faults))
    targets = _targets(table)
    problems = [f"{fault}: source {name} -> target {targets.get(name, 'unknown')}" for name, fault in faults_of_files]
    problems += _check_sources(table, shapes | unused_shapes(table, shapes), entries)
    place = _sharding_of(shardings, shapes, problems)
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{directory} does not fit the {kind} that its config.json describes:\n  {lines}")
    return module, _read_parameters(table, entries, shapes, dtype, place, keep_unused)


def _read_converted(
    kind: str, module: nn.Module, directory: epath.Path, dtype: str | None, shardings: Shardings, keep_unused: bool
) -> dict[str, Any]:
    if keep_unused:
        raise ValueError(f"{directory} was converted, which drops what is not used; give the directory it came from")
    shapes, problems = kinds.parameter_shapes(kind, module), []
    place = _sharding_of(shardings, shapes, problems)
    if problems:
        raise ValueError("\n  ".join(["the shardings do not fit the parameters:", *problems]))
    return converted.read(directory, shapes, dtype, place)


def _read_parameters(
    table: list[Row],
    entries: Mapping[str, Entry],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str | None,
    place: Callable[[str], jax.sharding.Sharding | None],
    keep_unused: bool,
) -> dict[str, Any]:
    params = {}
    with Reader() as reader:
        for row in table:
            names = row.names()
            if row.unused and not (keep_unused and all(name in entries for name in names)):
                continue
            read = _layer_reader(reader, row, [entries[name] for name in names])
            if row.unused:
                params[row.target] = np.stack([read(i) for i in range(row.layers)]) if row.layers else read(0).copy()
                continue
            stored = jax.numpy.result_type(*(entries[name].dtype for name in names))
            array = _build_array(
                read, row.layers, shapes[row.target], jax.numpy.dtype(dtype or stored), place(row.target)
            )
            # The host buffers of one parameter are freed before the next one is read.
            params[row.target] = jax.block_until_ready(array)
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _build_module(kind: str, directory: epath.Path, compute_dtype: Any, module_options: dict[str, Any]) -> nn.Module:
    if compute_dtype is not None:
        module_options = module_options | {"dtype": jax.numpy.dtype(compute_dtype)}
    module = kinds.build(kind, read_config(directory), **module_options)
    return _with_answers(module, directory, "answer_ids" in module_options) if hasattr(module, "answer_ids") else module


def _with_answers(scorer: nn.Module, directory: epath.Path, given: bool) -> nn.Module:
    """Returns the scorer with the ids of (No, Yes): those given, or the tokenizer's, or those of config.json."""
    answer_ids = scorer.answer_ids
    if not given and any((directory / name).exists() for name in TOKENIZERS):
        read = _read_answer_ids(directory)
        if answer_ids not in (None, read):
            raise ValueError(
                f"{directory}: config.json has the answers (No, Yes) at {answer_ids}, its tokenizer at {read}; mend one"
            )
        answer_ids = read
    if answer_ids and (answer_ids[0] == answer_ids[1] or max(answer_ids) >= scorer.language.vocabulary):
        raise ValueError(
            f"{directory}: the answers (No, Yes) have ids {answer_ids}; expected two different ones below the "
            f"vocabulary's {scorer.language.vocabulary}. Is the tokenizer that of the weights?"
        )
    return scorer.clone(answer_ids=answer_ids)


def _read_answer_ids(directory: epath.Path) -> tuple[int, int]:
    """Returns the token ids of No and Yes from the tokenizer of a scorer's directory."""
    tokenizer = read_tokenizer(directory)
    try:
        return answer_id(tokenizer, "No"), answer_id(tokenizer, "Yes")
    except ValueError as error:
        raise ValueError(f"{directory}: {error}; give answer_ids=(no, yes) yourself") from error


def _targets(table: Iterable[Row]) -> dict[str, str]:
    targets = collections.defaultdict(list)
    for row in table:
        for name in row.names():
            targets[name].append(row.target)
    return {name: ", ".join(paths) for name, paths in targets.items()}


def read_config(directory: epath.Path) -> dict[str, Any]:
    """Returns `config.json` of the directory; raises FileNotFoundError or ValueError naming the file."""
    file = directory / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"no {file}; expected a directory in the Hugging Face layout: config.json, *.safetensors"
        )
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object but a {type(config).__name__}")
    return config


def _check_sources(
    table: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]
) -> list[str]:
    """Returns missing, wrongly shaped, non-floating and unexpected tensors of the checkpoint."""
    problems, known = [], set()
    for row in table:
        names = row.names()
        known.update(names)
        for name in names:
            if name not in entries:
                problems += [] if row.unused else [f"missing: source {name} -> target {row.target}"]
                continue
            entry = entries[name]
            if not jax.numpy.issubdtype(entry.dtype, jax.numpy.floating):
                problems.append(
                    f"dtype: source {name} -> target {row.target}: {entry.dtype} is not floating point; quantised "
                    "checkpoints are not read"
                )
            shape = shapes[row.target][1:] if row.layers else shapes[row.target]
            expected = row.source_shape(shape)
            if entry.shape != expected:
                problems.append(
                    f"shape: source {name} {list(entry.shape)} -> target {row.target} {list(shapes[row.target])}: "
                    f"expected source {list(expected)}"
                )
    unexpected = sorted(entries.keys() - known)
    return problems + [f"unexpected: source {name} {list(entries[name].shape)} has no target" for name in unexpected]


def _sharding_of(
    shardings: Shardings, shapes: Mapping[str, Any], problems: list[str]
) -> Callable[[str], jax.sharding.Sharding | None]:
    """Returns the sharding as a function of the path; adds to `problems` what a tree of shardings lacks."""
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return lambda path: shardings
    if callable(shardings):
        return shardings
    flat = flax.traverse_util.flatten_dict(shardings, sep="/")
    problems += [f"shardings: no entry for target {path}" for path in sorted(shapes.keys() - flat.keys())]
    return flat.__getitem__


def _layer_reader(reader: Reader, row: Row, entries: list[Entry]) -> Callable[[int], np.ndarray]:
    return lambda layer: row.to_flax(reader.read(entries[layer]))


def _build_array(
    read: Callable[[int], np.ndarray],
    layers: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Reads a parameter layer by layer into a host buffer for each different shard; hands these to the devices."""
    if sharding is None:
        return jax.device_put(_fill(read, layers, [tuple(slice(0, n) for n in shape)], dtype)[0])
    devices = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices[tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))].append(device)
    buffers = _fill(read, layers, [tuple(slice(*bounds) for bounds in key) for key in devices], dtype)
    arrays = [jax.device_put(b, d) for b, group in zip(buffers, devices.values(), strict=True) for d in group]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _fill(
    read: Callable[[int], np.ndarray], layers: int, indices: list[tuple[slice, ...]], dtype: np.dtype
) -> list[np.ndarray]:
    """Returns the parts of the parameter that `indices` cut out; layers that none of them holds are not read."""
    buffers = [_aligned([part.stop - part.start for part in index], dtype) for index in indices]
    if not layers:
        x = read(0)
        for buffer, index in zip(buffers, indices, strict=True):
            buffer[...] = x[index]
        return buffers
    for layer in range(layers):
        holders = [(b, i) for b, i in zip(buffers, indices, strict=True) if i[0].start <= layer < i[0].stop]
        if holders:
            x = read(layer)
        for buffer, index in holders:
            buffer[layer - index[0].start] = x[index[1:]]
    return buffers


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
