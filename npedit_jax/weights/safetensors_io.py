"""Reading and writing safetensors files one tensor at a time, on any file system `etils.epath` knows.

Format: the header's length (64 bits, little-endian), a JSON header (name -> dtype, shape, data_offsets), raw data.
The library of the same name maps local files only, so the format, which is small, is read here.
"""

import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
WRITE_BYTES = 64 * 1024 * 1024  # at a time: remote file systems want bytes objects, and these are copies
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `bytes` bytes from `start` of `file`."""

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: epath.Path) -> dict[str, Entry]:
    """Returns the tensors of one file by name, without reading their data.

    Raises:
      ValueError: the file is no whole safetensors file; says which file and what is wrong with it.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)  # `file.stat()` looks up the owner's name, which containers may not have
        stream.seek(0)
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file}: not a safetensors file: {size} bytes, too short for a header length")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{file}: corrupt or truncated: the header claims {length} bytes, the file has {size - 8} after the "
                "length; download or copy it again"
            )
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            spans = {name: (int(v["data_offsets"][0]), int(v["data_offsets"][1])) for name, v in header.items()}
            kinds = {name: (v["dtype"], tuple(map(int, v["shape"]))) for name, v in header.items()}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{file}: corrupt header: {type(error).__name__}: {error}; download it again") from error

    entries = _locate(file, spans, kinds, 8 + length)
    end = 8 + length + sum(entry.bytes for entry in entries.values())
    if size != end:
        raise ValueError(f"{file}: {size} bytes, but its header describes {end}: truncated or damaged; copy it again")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"names given twice: {[name for name, n in names.items() if n > 1]}")
    return result


def _locate(
    file: epath.Path, spans: dict[str, tuple[int, ...]], kinds: dict[str, tuple[str, tuple[int, ...]]], base: int
) -> dict[str, Entry]:
    """Turns the header's spans into entries, having checked that these follow each other without gap or overlap."""
    entries, end = {}, 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        code, shape = kinds[name]
        if code not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r} has dtype {code!r}; known are {list(DTYPES)}")
        entries[name] = Entry(file, DTYPES[code], shape, base + start)
        if start != end or stop - start != entries[name].bytes or min(shape, default=0) < 0:
            raise ValueError(
                f"{file}: corrupt header: tensor {name!r} of {code} {list(shape)} claims bytes {start} to {stop}; "
                f"expected {end} to {end + entries[name].bytes}"
            )
        end = stop
    return entries


def index_directory(directory: epath.Path) -> tuple[dict[str, Entry], list[tuple[str, str]]]:
    """Returns every tensor of a checkpoint directory by name, and (name, fault) where its files do not fit together.

    Reads the shards that `*.safetensors.index.json` names, or without one every `*.safetensors` file.

    Raises:
      FileNotFoundError: no weights there, or a shard is missing.
      ValueError: pickled weights, several indices, or a file that is not whole.
    """
    files, weight_map = _find_files(directory)
    entries, owners = {}, collections.defaultdict(list)
    for file in files:
        for name, entry in read_header(file).items():
            entries[name] = entry
            owners[name].append(file.name)
    faults = [(name, f"duplicate, in {' and in '.join(found)}") for name, found in owners.items() if len(found) > 1]
    for name, file in weight_map.items():
        if file not in owners[name]:
            found = f"it is in {owners[name][0]}" if owners[name] else "no shard has it"
            faults.append((name, f"the index puts it in {file}, but {found}"))
    if weight_map:
        faults += [(name, "in a shard, but not in the index") for name in sorted(entries.keys() - weight_map.keys())]
    return entries, faults


def _find_files(directory: epath.Path) -> tuple[list[epath.Path], dict[str, str]]:
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}")
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{directory} has {len(indices)} indices {[i.name for i in indices]}; leave one")
    if indices:
        try:
            weight_map = dict(json.loads(indices[0].read_text())["weight_map"])
            if odd := [name for name, file in weight_map.items() if not isinstance(file, str)]:
                raise ValueError(f"tensors {odd} are in no file")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{indices[0]}: not a safetensors index: {type(error).__name__}: {error}") from error
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if name != pathlib.PurePosixPath(name).name or name == ".."]:
            raise ValueError(f"{indices[0]} names files outside its directory: {outside}; put all shards beside it")
        if pickles := [name for name in names if name.endswith(PICKLES)]:
            raise ValueError(_pickled(directory, pickles))
        files = [directory / name for name in names]
        if missing := [file.name for file in files if not file.exists()]:
            raise FileNotFoundError(f"{directory} lacks shards that {indices[0].name} names: {missing}; fetch them")
        return files, weight_map
    if files := sorted(directory.glob("*.safetensors")):
        return files, {}
    raise FileNotFoundError(f"{directory} has no *.safetensors file")


def refuse_pickles(path: epath.Path) -> None:
    """Raises ValueError where weights are pickled: the path is such a file, or a directory with no others."""
    if path.name.endswith(PICKLES) and not path.is_dir():
        raise ValueError(_pickled(path.parent, [path.name]))
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir())
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in names):
            raise ValueError(_pickled(path, pickles))


def _pickled(directory: epath.Path, names: Sequence[str]) -> str:
    return (
        f"{directory} holds pickled weights {list(names)}, which can run code when opened and are not read here; "
        "convert them once in PyTorch: load the model with its class's from_pretrained(directory), then call "
        "save_pretrained(new_directory, safe_serialization=True). A bare state dict: "
        "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors'), beside its config.json"
    )


class Reader(contextlib.ExitStack):
    """Reads tensors of several files, each opened once; a context manager that closes them."""

    def __init__(self):
        super().__init__()
        self._streams = {}

    def read(self, entry: Entry) -> np.ndarray:
        """Returns one tensor, and holds no copy of it."""
        if entry.file not in self._streams:
            self._streams[entry.file] = self.enter_context(entry.file.open("rb"))
        stream = self._streams[entry.file]
        stream.seek(entry.start)
        data = stream.read(entry.bytes)
        if len(data) != entry.bytes:
            raise ValueError(f"{entry.file}: wanted {entry.bytes} bytes at {entry.start}, got {len(data)}: truncated")
        return np.frombuffer(data, entry.dtype).reshape(entry.shape)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor yet to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split_shards(tensors: Iterable[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Cuts the tensors, in order, into files of at most `max_shard_bytes` of data (a larger tensor gets its own)."""
    shards, room = [], 0
    for tensor in tensors:
        if not shards or tensor.bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    return shards


def write_file(file: epath.Path, tensors: Sequence[Planned], values: Iterator[np.ndarray]) -> None:
    """Writes one file; `values` gives the tensors' contents in the same order, one at a time.

    Raises:
      ValueError: a value has another shape or dtype than was planned.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        span = [offset, offset + tensor.bytes]
        header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts aligned, as the safetensors library leaves it
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor, value in zip(tensors, values, strict=True):
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                found = f"{value.dtype} {list(value.shape)}"
                raise ValueError(f"{tensor.name}: expected {tensor.dtype} {list(tensor.shape)}, found {found}")
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            for start in range(0, data.size, WRITE_BYTES):
                stream.write(data[start : start + WRITE_BYTES].tobytes())
