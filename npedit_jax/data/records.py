"""Records on disk: one reference image with its texts each, in ArrayRecord shards with a manifest and an index.

    DIR/manifest.json                               counts, shards with their checksums, what was left out and why
    DIR/index.npz                                   a row of numbers per record: its type, size and content hash
    DIR/NAME-train.array_record-00000-of-00010      the shards

A record is a serialized `tf.train.Example`, so TensorFlow Datasets reads the shards too; neither TensorFlow nor Beam is
needed here. Nothing that leaves a record out rewrites a shard: the index says which records are used.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import resource
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from npedit_jax import atomic

SCHEMA = 1
MANIFEST, INDEX = "manifest.json", "index.npz"
KEPT = 0  # value of the index column `left_out` on records that are used; others count from 1 in the manifest's order
_OPTIONS = "group_size:1,uncompressed"  # every record by itself; images are compressed already
_READING = "readahead_buffer_size:0"  # one record at a time
_READER_BUFFER = 32 * 2**10
_MOST_READERS = 512  # that a set keeps open, each with some 170 KiB
_BLOCK = 8 * 2**20


class RecordError(ValueError):
    """A record that cannot be used; `reason` is one word to count by."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Record:
    """One reference image and what is known about it; a text that is not known is empty.

    Attributes:
      image: the file as it came: JPEG, PNG or WebP.
      width: pixels of the picture as it is seen, turned upright.
      height: likewise.
      instruction: what the editor is told.
      edited_caption: of the edited image.
      input_caption: of this image.
      edit_type: a name of `edit_types.EDIT_TYPES`, or the source's own where that has none.
      object: what is edited, as a noun, or the source's category.
      id: unique within the source.
      source: the data set it comes from.
    """

    image: bytes
    width: int
    height: int
    instruction: str
    edited_caption: str
    input_caption: str
    edit_type: str
    object: str
    id: str
    source: str


FIELDS = {field.name: field.type for field in dataclasses.fields(Record)}

# What is written down about each record beside the shards.
INDEX_TYPE = np.dtype(
    [
        ("edit_type", np.int16),  # place in the manifest's `edit_types`
        ("height", np.int32),
        ("width", np.int32),
        ("instruction", np.int32),  # characters
        ("edited_caption", np.int32),
        ("input_caption", np.int32),
        ("object", np.int32),  # likewise; -1 where an older version wrote the index
        ("image", np.uint64),  # hash of the image file
        ("content", np.uint64),  # hash of image file and instruction
        ("left_out", np.int16),
    ]
)


def encode(record: Record) -> bytes:
    """A record as the bytes of a tf.train.Example."""
    example = _Example()
    for name, kind in FIELDS.items():
        value, feature = getattr(record, name), example.features.feature[name]
        if kind is int:
            feature.int64_list.value.append(value)
        else:
            feature.bytes_list.value.append(value if kind is bytes else value.encode())
    return example.SerializeToString(deterministic=True)


def decode(data: bytes) -> Record:
    """The inverse of `encode`.

    Raises:
      RecordError: the bytes are no record, or lack a field.
    """
    example = _Example()
    try:
        example.ParseFromString(data)
        features = example.features.feature
        missing = [name for name in FIELDS if name not in features]
        if missing:
            raise RecordError("schema", f"a record has no {missing}; it has {sorted(features)}")
        return Record(**{name: _value(features[name], kind) for name, kind in FIELDS.items()})
    except (message.DecodeError, UnicodeDecodeError, IndexError) as error:
        raise RecordError("schema", f"{len(data)} bytes are no record: {error}") from error


def write_shard(path: epath.PathLike, records: Iterable[Record]) -> None:
    """Writes one shard, over an old one, and PATH.json (checksum, sizes) and PATH.npz (index rows) beside it.

    They are for `write_manifest`. Holds the rows and one record.
    """
    path, rows = epath.Path(path), []
    names: dict[str, int] = {}
    with _local(path) as local:
        writer = array_record_module.ArrayRecordWriter(str(local), _OPTIONS)
        try:
            for record in records:
                writer.write(encode(record))
                rows.append(_row(record, names.setdefault(record.edit_type, len(names))))
        finally:
            writer.close()
        checksum, size = _checksum(local)
    with _beside(path, ".npz").open("wb") as file:
        np.savez(file, rows=np.array(rows, INDEX_TYPE), edit_types=np.array(list(names), dtype=str))
    entry = {"file": path.name, "count": len(rows), "bytes": size, "sha256": checksum}
    _beside(path, ".json").write_text(json.dumps(entry))


def shard_name(name: str, number: int, shards: int) -> str:
    """The file name of a shard, as TensorFlow Datasets names them."""
    return f"{name}-train.array_record-{number:05d}-of-{shards:05d}"


def save_index(
    directory: epath.PathLike, manifest: Mapping[str, Any], rows: np.ndarray, reasons: Sequence[str] = ()
) -> None:
    """Writes index and manifest; `reasons` name the values of the column `left_out` from 1 on.

    Those that are there before fit one another at every moment but for the manifest's counts of what is left out.
    """
    directory = epath.Path(directory)
    counts = np.bincount(rows["left_out"], minlength=1 + len(reasons)).tolist()
    left_out = dict(zip(reasons, counts[1:], strict=True))
    with atomic.file(directory / INDEX) as partial, partial.open("wb") as file:
        np.savez(file, rows=rows)
    text = json.dumps({**manifest, "kept": counts[KEPT], "left_out": left_out}, indent=1, ensure_ascii=False)
    atomic.write_text(directory / MANIFEST, text + "\n")


def write_manifest(
    directory: epath.PathLike,
    shards: Sequence[str],
    save: Callable[[epath.Path, Mapping[str, Any], np.ndarray], None] = save_index,
    **facts: Any,
) -> None:
    """Puts what `write_shard` wrote about each shard together as manifest and index.

    Args:
      shards: names of the shards, in order.
      save: writes them; by default every record is used.
      facts: more for the manifest: plain values by name.
    """
    directory = epath.Path(directory)
    entries, parts, names = [], [], {}
    for shard in shards:
        path = directory / shard
        entries.append(json.loads(_beside(path, ".json").read_text()))
        with _beside(path, ".npz").open("rb") as file, np.load(file) as part:
            rows, own = part["rows"], part["edit_types"].tolist()
        numbers = np.array([names.setdefault(name, len(names)) for name in own], np.int16)
        rows["edit_type"] = numbers[rows["edit_type"]] if own else rows["edit_type"]
        parts.append(rows)
    rows = np.concatenate([*parts, np.zeros(0, INDEX_TYPE)])
    manifest = {"schema": SCHEMA, "count": len(rows), "shards": entries, "edit_types": list(names), **facts}
    save(directory, manifest, rows)
    for shard in shards:
        for suffix in (".json", ".npz"):
            _beside(directory / shard, suffix).unlink()


def write(directory: epath.PathLike, name: str, records: Iterable[Record], *, per_shard: int = 1000) -> "Records":
    """Writes a small set in this process; a large one is Beam's job, see `prepare`.

    Raises:
      FileExistsError: the directory holds records already.
    """
    directory = epath.Path(directory)
    if (directory / MANIFEST).exists():
        raise FileExistsError(f"{directory} holds records already; give another directory")
    directory.mkdir(parents=True, exist_ok=True)
    records, pending = list(records), []
    shards = max(1, -(-len(records) // per_shard))
    for number in range(shards):
        pending.append(shard_name(name, number, shards))
        write_shard(directory / pending[-1], records[number * per_shard : (number + 1) * per_shard])
    write_manifest(directory, pending, name=name)
    return Records(directory)


class Shards:
    """The shards of a directory, read at random; small enough to be handed to another process."""

    def __init__(self, directory: epath.PathLike, shards: Sequence[Mapping[str, Any]]):
        """`shards` are the manifest's; a file is opened when it is first read.

        Raises:
          ValueError: the directory is an address, which ArrayRecord does not open.
        """
        self._directory, self._shards = epath.Path(directory), shards
        if "://" in str(directory):
            raise ValueError(f"shards are opened by their path; mount the bucket of {directory} and give that path")
        self._ends = list(itertools.accumulate(shard["count"] for shard in shards))
        self._readers = _Readers()

    def __getitem__(self, number: int) -> Record:
        """Reads one record.

        Raises:
          IndexError: no record of that number.
          OSError: the process may open no more files; no record is at fault.
          RecordError: "unreadable" where the shard is damaged there, "schema" where it holds something else.
        """
        shard, place = self._find(number)
        path = str(self._directory / self._shards[shard]["file"])
        try:
            data = self._readers.read(path, place)
        except RuntimeError as error:
            if os.strerror(errno.EMFILE) in str(error):
                raise OSError(
                    f"{path}: {os.strerror(errno.EMFILE)}; the limit of this process is "
                    f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: raise it (ulimit -n), or prepare fewer shards"
                ) from error
            raise RecordError("unreadable", f"{self.describe(number)}: {error}") from error
        return decode(data)

    def _find(self, number: int) -> tuple[int, int]:
        """Shard of a record, and its place there."""
        shard = bisect.bisect_right(self._ends, number)
        if number < 0 or shard == len(self._ends):
            raise IndexError(f"record {number} of {self._ends[-1] if self._ends else 0}")
        return shard, int(number) - (self._ends[shard - 1] if shard else 0)

    def describe(self, number: int) -> str:
        """Shard and place of a record, which can be told when the record cannot be read."""
        shard, place = self._find(number)
        return f"{self._shards[shard]['file']}#{place}"

    def damaged(self, *, threads: int = 8) -> list[str]:
        """Files that are missing or differ from the manifest's checksum; reads all of them."""
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(self._is_damaged, self._shards))
        return [shard["file"] for shard, bad in zip(self._shards, found, strict=True) if bad]

    def _is_damaged(self, shard: Mapping[str, Any]) -> bool:
        path = self._directory / shard["file"]
        return not path.exists() or _checksum(path) != (shard["sha256"], shard["bytes"])


class Records:
    """A directory of records.

    Attributes:
      directory: where they are.
      manifest: what manifest.json holds.
      index: structured array of INDEX_TYPE, a row for every record, those left out too.
    """

    def __init__(self, directory: epath.PathLike):
        """Reads manifest and index.

        Raises:
          FileNotFoundError: no manifest there.
          ValueError: another schema, a damaged manifest or index, or an index that does not fit the manifest.
        """
        self.directory = epath.Path(directory)
        if not (self.directory / MANIFEST).exists():
            raise FileNotFoundError(
                f"no records in {directory} (no {MANIFEST}); write them with python -m npedit_jax.data.prepare"
            )
        try:
            self.manifest = json.loads((self.directory / MANIFEST).read_text())
            schema, counts = self.manifest["schema"], sum(shard["count"] for shard in self.manifest["shards"])
            with (self.directory / INDEX).open("rb") as file, np.load(file) as arrays:
                self.index = _with_objects(arrays["rows"])
            fits = len(self.index) == counts == self.manifest["count"] and self.index.dtype == INDEX_TYPE
        except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"{MANIFEST} or {INDEX} in {directory} is damaged ({told}); prepare it anew") from error
        if schema != SCHEMA:
            raise ValueError(f"{directory} has schema {schema}, this reads {SCHEMA}; prepare it anew")
        if not fits:
            raise ValueError(f"{directory}: {INDEX} has {len(self.index)} rows for {counts} records; prepare it anew")

    @functools.cached_property
    def shards(self) -> Shards:
        """What reads the records; raises ValueError where they lie at an address. Index and manifest may."""
        return Shards(self.directory, self.manifest["shards"])

    @property
    def edit_types(self) -> list[str]:
        """Names by the index's numbers."""
        return self.manifest["edit_types"]

    def kept(self) -> np.ndarray:
        """Numbers of the records that are used, ascending."""
        return np.flatnonzero(self.index["left_out"] == KEPT)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Record:
        """Reads one record; raises RecordError as `Shards` does."""
        return self.shards[number]


class _Readers:
    """Open shards, those read last: a set may have more of them than a process may open files."""

    def __init__(self):
        self._open: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._most = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # another process opens its own

    def read(self, path: str, place: int) -> bytes:
        """Reads a record; raises RuntimeError where that fails, and opens the file anew the next time."""
        with self._lock:
            self._most = self._most or _most_readers()
            if (reader := self._open.pop(path, None)) is None:
                if len(self._open) >= self._most:
                    self._open.popitem(last=False)  # closed as soon as no thread reads from it
                reader = array_record_module.ArrayRecordReader(
                    path, options=_READING, file_reader_buffer_size=_READER_BUFFER
                )
            self._open[path] = reader
        try:
            return reader.read([place])[0]
        except RuntimeError:
            with self._lock:
                if self._open.get(path) is reader:
                    del self._open[path]
            raise


def _most_readers() -> int:
    """How many shards of a set are kept open: an eighth of the files that this process may open, at most.

    The limit is raised as far as the process may do so itself.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_READERS if soft == resource.RLIM_INFINITY else max(1, min(_MOST_READERS, soft // 8))


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[epath.Path]:
    """A file to write by its path, as ArrayRecord does; when it is done, `path` is a copy of it, or is it."""
    if "://" not in str(path):
        with atomic.file(path) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory() as folder:
        yield (local := epath.Path(folder) / path.name)
        with local.open("rb") as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy, _BLOCK)


def _beside(path: epath.Path, suffix: str) -> epath.Path:
    return path.with_name(path.name + suffix)


def _checksum(path: epath.Path) -> tuple[str, int]:
    """SHA-256 and size of a file."""
    checksum, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
            size += len(block)
    return checksum.hexdigest(), size


def _row(record: Record, edit_type: int) -> tuple[int, ...]:
    texts = (record.instruction, record.edited_caption, record.input_caption, record.object)
    image = hashlib.blake2b(record.image, digest_size=8)
    content = hashlib.blake2b(image.digest() + record.instruction.encode(), digest_size=8)
    hashes = (int.from_bytes(item.digest(), "little") for item in (image, content))
    return (edit_type, record.height, record.width, *map(len, texts), *hashes, KEPT)


def _with_objects(rows: np.ndarray) -> np.ndarray:
    """An index with its column `object`, which older versions did not write."""
    names = [name for name in INDEX_TYPE.names if name != "object"]
    if rows.dtype != np.dtype([(name, INDEX_TYPE[name]) for name in names]):
        return rows
    whole = np.full(rows.shape, -1, INDEX_TYPE)
    for name in names:
        whole[name] = rows[name]
    return whole


def _value(feature: Any, kind: type) -> Any:
    if kind is int:
        return feature.int64_list.value[0]
    data = feature.bytes_list.value[0]
    return data if kind is bytes else data.decode()


def _example_class() -> type[message.Message]:
    """tf.train.Example from its wire format (tensorflow/core/example): bytes are field 1 of a Feature, ints 3."""
    proto = descriptor_pb2.FileDescriptorProto(name="npedit_jax/example.proto", package="npedit_jax", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def add(parent: Any, name: str, fields: Mapping[str, tuple[int, int | str]], *, repeated: bool = False) -> Any:
        """Adds a message type; a field's kind is a scalar's number, or the name of a message."""
        made = parent.add(name=name)
        for label, (number, kind) in fields.items():
            item = made.field.add(name=label, number=number)
            item.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            item.type = field.TYPE_MESSAGE if isinstance(kind, str) else kind
            if isinstance(kind, str):
                item.type_name = f".npedit_jax.{kind}"
        return made

    types = proto.message_type
    add(types, "BytesList", {"value": (1, field.TYPE_BYTES)}, repeated=True)
    add(types, "Int64List", {"value": (1, field.TYPE_INT64)}, repeated=True)
    add(types, "Feature", {"bytes_list": (1, "BytesList"), "int64_list": (3, "Int64List")})
    features = add(types, "Features", {"feature": (1, "Features.FeatureEntry")}, repeated=True)
    entry = add(features.nested_type, "FeatureEntry", {"key": (1, field.TYPE_STRING), "value": (2, "Feature")})
    entry.options.map_entry = True
    add(types, "Example", {"features": (1, "Features")})
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("npedit_jax.Example"))


_Example = _example_class()
