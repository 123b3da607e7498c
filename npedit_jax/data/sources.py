"""Where samples come from: records on disk, behind the interface that every source has.

`data.easyvqa_source` is the other source.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from npedit_jax.data import buckets as buckets_lib
from npedit_jax.data import edit_types, images
from npedit_jax.data.records import RecordError, Records, Shards

# A mirrored image no longer fits a text that tells the sides apart, and mirrored letters are none.
_SIDED = re.compile(
    r"\b((left|right)(most|wards?|[- ]?hand(ed)?|[- ]?side)?|(anti|counter)?-?clockwise)\b"
    r"|\b(texts?|words?|letter\w*|writ\w+|wrote|caption\w*|sign\w*|logos?|fonts?|labels?|numbers?|digits?|reads?|says?"
    r"|spell\w*|typograph\w*|inscri\w+|titles?|slogans?|graffiti|watermarks?|monograms?|initials|plates?"
    r"|(hand|type)writ\w+|subtitle\w*|headlin\w*|phrases?|quot\w+|characters?|typefaces?|calligraph\w*|translat\w+"
    r"|alphabet\w*|tattoo\w*)\b"
    r"|[\"“”«»]|(?<!\w)['‘][^'’]+['’](?!\w)",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A reference image with its texts.

    Attributes:
      image: uint8 [H, W, 3], of the bucket's size.
      instruction: what is to be done.
      edited_caption: of the edited image.
      input_caption: of this image.
      object: what is edited, as a noun.
      id: names the record.
    """

    image: np.ndarray
    instruction: str
    edited_caption: str
    input_caption: str
    object: str
    id: str


class Unusable(ValueError):
    """A record that cannot be used: its id, the reason in a word, and the whole story."""

    def __init__(self, id: str, reason: str, message: str):
        super().__init__(message)
        self.id, self.reason = id, reason


Read = Callable[[int, int, np.random.Generator], Example]  # (bucket, number of the sample in it, rng)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Samples of one kind.

    Attributes:
      weight: share of the samples, in any unit.
      sizes: samples of each bucket.
      read: makes one; raises Unusable.
      edit_type: a name of the source's `edit_types`, "" on pictures.
    """

    weight: float
    sizes: tuple[int, ...]
    read: Read
    edit_type: str = ""


class Source(Protocol):
    """What samples are drawn from.

    Attributes:
      edit_types: all there may be; a batch holds places in it.
      buckets: (height, width) of the images.
    """

    edit_types: Sequence[str]
    buckets: Sequence[tuple[int, int]]

    def edits(self, shares: Mapping[str, float]) -> dict[str, Pool]:
        """Pools of samples to edit; `shares` are those of the edit types, in any unit."""

    def captioned(self) -> dict[str, Pool]:
        """Pools of images with their own captions."""

    def pictures(self, **options: float) -> dict[str, Pool]:
        """Pools of images with captions for a text-to-image model; options are the source's own."""


class RecordSource:
    """Records of one or more sets, by edit type and resolution bucket.

    Attributes:
      edit_types: all that records may have.
      buckets: (height, width) that pictures are cropped to.
    """

    edit_types = edit_types.EDIT_TYPES

    def __init__(
        self,
        sets: Mapping[str, Records],
        buckets: Sequence[tuple[int, int]],
        *,
        weights: Mapping[str, float] | None = None,
        fraction: float = 1.0,
        flip: float = 0.0,
    ):
        """Sorts the records into buckets, from their index alone.

        Args:
          sets: records by the name of their set.
          buckets: see `data.buckets`.
          weights: share of each set within an edit type, in any unit, 0 leaves it out; by default its number of
            records of the type.
          fraction: share of the images to use, chosen by their content: the same ones in every set and every run.
          flip: probability that an image is mirrored, where no text of its record tells the sides apart.

        Raises:
          ValueError: a fraction outside (0, 1], or weights of other sets, below 0, or not finite.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"expected a share of the images with 0 < fraction <= 1; found {fraction}")
        if weights and set(weights) != set(sets):
            raise ValueError(f"expected a weight for each of {sorted(sets)}; found {sorted(weights)}")
        if wrong := {name: weight for name, weight in (weights or {}).items() if not 0 <= weight < math.inf}:
            raise ValueError(f"expected weights of 0 or more; found {wrong}")
        self.buckets = tuple(map(tuple, buckets))
        self._sets, self._weights, self._flip = dict(sets), dict(weights or {}), flip
        self._kept, self._bucket = {}, {}
        for name, records in self._sets.items():
            kept = records.kept()
            # The image's hash is uniform in 64 bits.
            kept = kept[records.index["image"][kept].astype(np.float64) < fraction * 2.0**64]
            rows = records.index[kept]
            self._kept[name] = kept
            self._bucket[name] = buckets_lib.choose(rows["height"], rows["width"], self.buckets)

    def edits(self, shares: Mapping[str, float]) -> dict[str, Pool]:
        """One pool per edit type and set, named "type/set", of the records that have instruction and edited caption.

        "nothing" has no records of its own: any record with a caption of its image will do. A removal without an
        object is a bad record, where the index did not leave it out: its question would be about nothing.

        Raises:
          ValueError: an edit type of which there is no such record, with what there is.
        """
        pools = {}
        for edit_type, share in shares.items():
            nothing = edit_type == edit_types.NOTHING
            needed = ("input_caption",) if nothing else ("instruction", "edited_caption")
            found = self._pools(share, needed, "" if nothing else edit_type)
            if not found and share > 0:
                counts = {name: records.manifest["left_out"] for name, records in self._sets.items()}
                raise ValueError(
                    f"no record of edit type {edit_type!r} has {' and '.join(needed)}; the sets have "
                    f"{ {name: records.edit_types for name, records in self._sets.items()} } and left out {counts}. "
                    "python -m npedit_jax.data.instructions writes missing texts; the weight 0 leaves a type out"
                )
            for name, pool in found.items():
                wrap = {edit_types.NOTHING: _do_nothing, edit_types.REMOVE: _with_object}.get(edit_type)
                read = functools.partial(wrap, pool.read) if wrap else pool.read
                pools[f"{edit_type}/{name}"] = dataclasses.replace(pool, read=read, edit_type=edit_type)
        return pools

    def captioned(self) -> dict[str, Pool]:
        """One pool per set, named like it, of the records that have a caption of their image."""
        pools = self._pools(1.0, ("input_caption",), "")
        if not pools:
            raise ValueError(f"no record of {sorted(self._sets)} has a caption of its image")
        return pools

    pictures = captioned

    def _pools(self, share: float, needed: Sequence[str], edit_type: str) -> dict[str, Pool]:
        """Pools by set of the records that have the texts needed, and the edit type where one is given."""
        numbers = {}
        for name, records in self._sets.items():
            rows = records.index[self._kept[name]]
            chosen = np.logical_and.reduce([rows[text] > 0 for text in needed])
            if edit_type:
                known = records.edit_types.index(edit_type) if edit_type in records.edit_types else -1
                chosen &= rows["edit_type"] == known
            bucket = self._bucket[name][chosen]
            kept = self._kept[name][chosen]
            numbers[name] = tuple(kept[bucket == number] for number in range(len(self.buckets)))
        sizes = {name: tuple(map(len, parts)) for name, parts in numbers.items()}
        weights = {name: self._weights.get(name, sum(sizes[name])) for name in numbers if sum(sizes[name])}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        total = sum(weights.values())
        return {
            name: Pool(share * weight / total, sizes[name], self._reader(name, numbers[name]))
            for name, weight in weights.items()
        }

    def _reader(self, name: str, numbers: tuple[np.ndarray, ...]) -> "_Reader":
        return _Reader(name, self._sets[name].shards, numbers, self.buckets, self._flip)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the records of a pool; holds no more of their index than their numbers, for worker processes' sake."""

    name: str
    shards: Shards
    numbers: tuple[np.ndarray, ...]
    buckets: Sequence[tuple[int, int]]
    flip: float

    def __call__(self, bucket: int, place: int, rng: np.random.Generator) -> Example:
        number = int(self.numbers[bucket][place])
        id = f"{self.name}#{number}"
        try:
            record = self.shards[number]
            id = f"{self.name}/{record.id}"
            image = images.decode(record.image, self.buckets[bucket])
        except (RecordError, images.BadImage) as error:
            raise Unusable(id, error.reason, str(error)) from error
        texts = (record.instruction, record.edited_caption, record.input_caption)
        sided = record.edit_type == "text" or any(map(_SIDED.search, (*texts, record.object)))
        if rng.random() < self.flip and not sided:
            image = image[:, ::-1]
        return Example(image, *texts, record.object, id)


def _with_object(read: Read, bucket: int, place: int, rng: np.random.Generator) -> Example:
    example = read(bucket, place, rng)
    if not example.object:
        raise Unusable(
            example.id, "no_object", f"{example.id} removes something and its `object` does not say what; name it"
        )
    return example


def _do_nothing(read: Read, bucket: int, place: int, rng: np.random.Generator) -> Example:
    """The record's image under an instruction to keep it."""
    example = read(bucket, place, rng)
    instruction = edit_types.DO_NOTHING[int(rng.integers(len(edit_types.DO_NOTHING)))]
    return dataclasses.replace(example, instruction=instruction, edited_caption=example.input_caption)
