"""TensorFlow and Hugging Face data sets saved on disk, as sequences of rows with their image files undecoded."""

import bisect
import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

Row = Mapping[str, Any]


def open_tfds(directory: str) -> Sequence[Row]:
    """The train split of a TensorFlow Datasets directory, as TFRecord or in a format that is read at random.

    Raises:
      ValueError: there is no such split.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    info = builder.info
    _require_train(directory, info.splits)
    image = tfds.features.Image
    skip = {name: tfds.decode.SkipDecoding() for name, kind in info.features.items() if isinstance(kind, image)}
    if info.file_format.value == "tfrecord":
        split = info.splits["train"]
        decode = lambda data: info.features.deserialize_example_np(data, decoders=skip)  # noqa: E731
        return _TFRecords([str(path) for path in split.filepaths], split.shard_lengths, decode)
    return builder.as_data_source(split="train", decoders=skip)


def open_huggingface(directory: str) -> Sequence[Row]:
    """A Hugging Face dataset as `save_to_disk` writes it, of several splits the one called train.

    Raises:
      ValueError: there is no such split.
    """
    import datasets

    rows = datasets.load_from_disk(directory)
    if isinstance(rows, datasets.DatasetDict):
        _require_train(directory, rows)
        rows = rows["train"]
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _require_train(directory: str, splits: Mapping[str, Any]) -> None:
    if "train" not in splits:
        raise ValueError(f"{directory} has the splits {sorted(splits)} and none called train, which is what is read")


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
