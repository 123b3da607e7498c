"""TensorFlow and Hugging Face data sets saved on disk, as sequences of rows with their image files undecoded."""

import bisect
import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

Row = Mapping[str, Any]


def open_tfds(directory: str, split: str = "") -> Sequence[Row]:
    """A TensorFlow Datasets directory, as TFRecord or in a format that is read at random; class labels by their names.

    Args:
      split: its name; by default train, or the only one.

    Raises:
      ValueError: there is no such split.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    info = builder.info
    split = _choose(directory, info.splits, split)
    image = tfds.features.Image
    skip = {name: tfds.decode.SkipDecoding() for name, kind in info.features.items() if isinstance(kind, image)}
    labels = {name: kind.names for name, kind in info.features.items() if isinstance(kind, tfds.features.ClassLabel)}
    if info.file_format.value == "tfrecord":
        files = info.splits[split]
        decode = lambda data: info.features.deserialize_example_np(data, decoders=skip)  # noqa: E731
        rows = _TFRecords([str(path) for path in files.filepaths], files.shard_lengths, decode)
    else:
        rows = builder.as_data_source(split=split, decoders=skip)
    return _Named(rows, labels) if labels else rows


def open_huggingface(directory: str, split: str = "") -> Sequence[Row]:
    """A Hugging Face dataset as `save_to_disk` writes it; class labels by their names.

    Args:
      split: its name, where there are several; by default train, or the only one.

    Raises:
      ValueError: there is no such split.
    """
    import datasets

    rows = datasets.load_from_disk(directory)
    if isinstance(rows, datasets.DatasetDict):
        rows = rows[_choose(directory, rows, split)]
    elif split:
        raise ValueError(f"{directory} holds rows and no splits; leave out the split {split!r}")
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    labels = {name: kind.names for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    return _Named(rows, labels) if labels else rows


def _choose(directory: str, splits: Mapping[str, Any], split: str) -> str:
    """The name of the split to read."""
    names = sorted(splits)
    if split and split not in names:
        raise ValueError(f"{directory} has the splits {names} and no {split!r}")
    if not split and "train" not in names and len(names) != 1:
        raise ValueError(f"{directory} has the splits {names} and none called train; name one with --split")
    return split or ("train" if "train" in names else names[0])


class _Named(Sequence):
    """Rows with the names of their class labels, which are stored as numbers."""

    def __init__(self, rows: Sequence[Row], labels: Mapping[str, Sequence[str]]):
        """`labels` are the names of each such column; a number without one is None."""
        self._rows, self._labels = rows, labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        row = dict(self._rows[number])
        for column, names in self._labels.items():
            value = row[column]
            row[column] = names[value] if value is not None and 0 <= value < len(names) else None
        return row


class _TFRecords(Sequence):
    """Rows of TFRecord files; cheap where they are asked for in order, as a span of them is."""

    def __init__(self, files: Sequence[str], counts: Sequence[int], decode: Callable[[bytes], Row]):
        """`counts` are the records of each file; `decode` makes a row of one."""
        self._files, self._decode = files, decode
        self._ends = list(itertools.accumulate(counts))
        self._next, self._file = 0, None  # the row before which the open file stands

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Row:
        """Raises ValueError where the file is cut off or damaged there."""
        shard = bisect.bisect_right(self._ends, number)
        first = self._ends[shard - 1] if shard else 0
        if self._file is None or not first < self._next <= number:
            if self._file is not None:
                self._file.close()
            self._file, self._next = epath.Path(self._files[shard]).open("rb"), first
        while self._next < number:
            self._file.seek(self._length() + 4, 1)
            self._next += 1
        data, sum_ = self._file.read(self._length()), self._file.read(4)
        self._next += 1
        if len(sum_) < 4 or _masked_crc(data) != sum_:
            raise ValueError(f"{self._files[shard]}: record {number - first} is cut off or damaged")
        return self._decode(data)

    def _length(self) -> int:
        """Reads the length that a record begins with (tensorflow/core/lib/io/record_writer.h)."""
        head, sum_ = self._file.read(8), self._file.read(4)
        if len(sum_) < 4 or _masked_crc(head) != sum_:
            raise ValueError(f"{self._file.name}: cut off or damaged at byte {self._file.tell() - 12}")
        return struct.unpack("<Q", head)[0]


def _masked_crc(data: bytes) -> bytes:
    """The CRC-32C that TFRecord files hold, turned by 15 bits and shifted by a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
