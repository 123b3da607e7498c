"""From samples to batches: Grain datasets whose order is a pure function of the seed.

A `grain.MapDataset` of batches holds batch k under index k, however it is reached and by however many hosts. Each
stream goes through its samples of a bucket in an order shuffled anew every epoch; streams are mixed in exact
proportions (`data.schedule`); everything that is drawn for a sample comes from the seed, the stream and the sample's
place in it. A sample that turns out bad keeps its place, with weight 0.

Shapes: B batch, L text tokens, Q questions per sample, S tokens of a question's prompt, T inner batches.
"""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from npedit_jax.data import packing
from npedit_jax.data import questions as questions_lib
from npedit_jax.data.schedule import Schedule
from npedit_jax.data.tokenize import QuestionTokens, ScorerTokenizer, TextTokenizer

Sample = dict[str, Any]
# (bucket, number of the sample in it, rng) -> one sample
Draw = Callable[[int, int, np.random.Generator], Sample]
NOTES = "notes"  # field of a batch that tells about its records; it never reaches a device
_PATIENCE = 1000  # samples that are counted as read at least, when the share of bad ones is asked for


class TooManyBadRecords(Exception):
    """More records than the configured share could not be used."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """How samples become batches.

    Attributes:
      seed: of the order and of everything drawn.
      batch_size: samples in a batch of this host, B.
      places: of the equal parts into which a batch over all hosts is cut, those that this host takes, in rising order.
      of: how many parts those are; all hosts together consume one global order.
      inner_batches: T: batches are [T, B, ...]; 0 for plain batches [B, ...].
    """

    seed: int
    batch_size: int
    places: tuple[int, ...] = (0,)
    of: int = 1
    inner_batches: int = 0

    @property
    def samples(self) -> int:
        """Samples of this host in a step."""
        return max(1, self.inner_batches) * self.batch_size

    @property
    def width(self) -> int:
        """Samples of a batch at each place."""
        return self.batch_size // len(self.places)

    @property
    def total(self) -> int:
        """Samples of all hosts in a step."""
        return self.samples // len(self.places) * self.of


@dataclasses.dataclass(frozen=True)
class Stream:
    """Samples that are gone through epoch by epoch.

    Attributes:
      weight: share of the samples, in any unit; 0 leaves the stream out.
      sizes: samples of each bucket.
      draw: makes one; it may use the bucket only to know the size of the images.
    """

    weight: float
    sizes: tuple[int, ...]
    draw: Draw


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a host reads ahead; none of it changes what is read.

    Attributes:
      workers: processes that make batches; 0 makes them in this one.
      threads: in each process.
      buffer: batches that wait ready, in each process.
      max_bad_share: share of bad records that ends the run, counted over at least a thousand samples; twice of it
        among some thousand in a row ends it too, however many were good before.
    """

    workers: int = 0
    threads: int = 1
    buffer: int = 4
    max_bad_share: float = 0.01


def batches(streams: Mapping[str, Stream], feed: Feed) -> grain.MapDataset:
    """Batches of streams by name; all samples of a step are of one bucket, the same on every host.

    Raises:
      ValueError: no stream has a weight, one has no samples, or they differ in the number of buckets.
    """
    streams = {name: stream for name, stream in sorted(streams.items()) if stream.weight > 0}
    if not streams:
        raise ValueError("no stream has a weight above 0; give at least one")
    empty = [name for name, stream in streams.items() if not sum(stream.sizes)]
    if empty:
        raise ValueError(f"no samples for {empty}; give them records, or the weight 0")
    sizes = np.array([stream.sizes for stream in streams.values()])
    order = Schedule([stream.weight for stream in streams.values()], sizes, feed.total, feed.seed)
    parts = [_part(feed.seed, name, streams[name], bucket) for name, bucket in _named(order.parts, list(streams))]
    leading = (feed.inner_batches, feed.batch_size) if feed.inner_batches else (feed.batch_size,)
    stack = functools.partial(_stack, leading=leading)
    mixed = grain.MapDataset.select_from_datasets(parts, HostShare(order, feed))
    return mixed.batch(feed.samples, drop_remainder=True, batch_fn=stack)


class Batches:
    """Iterates over batches from any of them on, reading ahead; counts what was bad or cut and keeps it from the step.

    Its state is the number of batches and the counts: neither the number of hosts nor `Reading` is part of it. All
    hosts are at the same batch; each has counts of its own. A checkpoint keeps the first host's; all go on from them.

    Attributes:
      counts: samples read, bad ones and texts cut, and bad ones by reason, since the run began: on this host.
    """

    def __init__(self, dataset: grain.MapDataset, reading: Reading):
        self._dataset, self._reading = dataset, reading
        self.counts: collections.Counter[str] = collections.Counter()
        self._recent = {"samples": 0, "bad": 0}  # of the last thousand or fewer
        self._next = 0
        self._iterator: Any = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Sample:
        """The next batch, arrays alone.

        Raises:
          TooManyBadRecords: with the counts by reason.
        """
        if self._iterator is None:
            self._iterator = self._start()
        batch = dict(next(self._iterator))
        self._next += 1
        self._note(batch.pop(NOTES))
        return batch

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"next_index": self._next, "counts": dict(self.counts)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint, of any number of hosts."""
        self._next = state["next_index"]
        self.counts = collections.Counter(state["counts"])
        self._iterator = None

    def _start(self) -> Any:
        reading = self._reading
        options = grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=reading.buffer)
        ahead = self._dataset[self._next :].to_iter_dataset(options)
        if reading.workers:
            if not flags.FLAGS.is_parsed():  # Grain hands the program's flags to its workers, even where there are none
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(reading.workers, per_worker_buffer_size=reading.buffer)
            ahead = ahead.mp_prefetch(processes)
        return iter(ahead)

    def _note(self, notes: Mapping[str, np.ndarray]) -> None:
        bad = notes["reason"] != ""
        self.counts["samples"] += bad.size
        self.counts["bad"] += int(bad.sum())
        if self._recent["samples"] >= _PATIENCE:
            self._recent = {"samples": 0, "bad": 0}
        self._recent["samples"] += bad.size
        self._recent["bad"] += int(bad.sum())
        self.counts["cut"] += int(notes["cut"].sum())
        for place in zip(*np.nonzero(notes["cut"]), strict=True):
            logging.info("cut a text of record %s to the configured length", notes["id"][place])
        if not bad.any():
            return
        for place in zip(*np.nonzero(bad), strict=True):
            reason = str(notes["reason"][place])
            self.counts[f"bad/{reason}"] += 1
            logging.warning("bad record %s (%s): %s", notes["id"][place], reason, notes["message"][place])
        share = self._reading.max_bad_share
        # Chance alone takes a share that is allowed past itself among so few, not past twice of it.
        for counts, limit in ((self.counts, share), (self._recent, min(2 * share, (1 + share) / 2))):
            if counts["bad"] <= limit * max(counts["samples"], _PATIENCE):
                continue
            reasons = {name: count for name, count in self.counts.items() if name.startswith("bad/")}
            raise TooManyBadRecords(
                f"{counts['bad']} of {counts['samples']} samples were bad: {reasons} in all. The log names each; "
                f"the limit is a share of {self._reading.max_bad_share}, data.reading.max_bad_share in the config"
            )


def iterate(dataset: grain.MapDataset, reading: Reading = Reading()) -> Batches:  # noqa: B008
    """Iterates from batch 0; the result has get_state and set_state."""
    return Batches(dataset, reading)


def arrays(batch: Sample) -> Sample:
    """A batch without the notes about its records."""
    return {name: value for name, value in batch.items() if name != NOTES}


class TextCache(dict):
    """Tokens of texts, each tokenized once: text -> (ids int32 [L], mask bool [L], whether it was cut).

    It holds the texts of a closed set; beyond its limit it starts anew.
    """

    _LIMIT = 1024

    def __init__(self, tokenizer: TextTokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple[type, tuple[TextTokenizer]]:
        return type(self), (self._tokenizer,)  # a worker begins with an empty one

    def __missing__(self, text: str) -> tuple[np.ndarray, np.ndarray, bool]:
        if len(self) >= self._LIMIT:
            self.clear()
        ids, mask, cut = self._tokenizer([text])
        self[text] = ids[0], mask[0], bool(cut[0])
        return self[text]

    def fields(self, name: str, text: str) -> tuple[Sample, bool]:
        """The text's ids and mask under `name`_ids and `name`_mask; and whether it was cut."""
        ids, mask, cut = self[text]
        return {f"{name}_ids": ids, f"{name}_mask": mask}, cut


class QuestionCache(dict):
    """Prompts of questions, each tokenized once: (text, images) -> its row of QuestionTokens; limited as TextCache."""

    _LIMIT = 1024

    def __init__(self, tokenizer: ScorerTokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple[type, tuple[ScorerTokenizer]]:
        return type(self), (self._tokenizer,)

    def __missing__(self, key: tuple[str, tuple[int, ...]]) -> QuestionTokens:
        if len(self) >= self._LIMIT:
            self.clear()
        text, images = key
        tokens = self._tokenizer([questions_lib.Question("", text, images, 1.0)])
        self[key] = QuestionTokens(*(field[0] for field in tokens))
        return self[key]

    def fields(
        self, asked: Sequence[questions_lib.Question], places: int, packed_length: int = 0
    ) -> tuple[Sample, bool]:
        """The prompts of one sample's questions, as the scorer takes them; and whether any was cut.

        Args:
          asked: at least one question.
          places: Q; those beyond the questions repeat the first one.
          packed_length: S of one row for all of them, see `data.packing`; 0 gives each a row of its own.

        Returns:
          "question_ids", "question_mask" and "image_index" [Q, L]; or "packed_ids", "packed_positions",
          "packed_segments" and "packed_image_index" [S], and "answer_place" [Q].
        """
        rows, repeats = [self[question.text, question.images] for question in asked], places - len(asked)
        cut = any(bool(row.cut) for row in rows)
        if packed_length:
            row = packing.pack(rows, packed_length)
            fields = {f"packed_{name}": value for name, value in row._asdict().items()}
            return fields | {"answer_place": _repeat_first(fields.pop("packed_answer_place"), repeats)}, cut
        ids, mask, image_index, _ = (_repeat_first(np.stack(field), repeats) for field in zip(*rows, strict=True))
        return {"question_ids": ids, "question_mask": mask, "image_index": image_index}, cut


def notes(id: str, *, cut: bool = False, reason: str = "", message: str = "") -> Sample:
    """What is told about a sample's record: its id, whether a text was cut, and why it is bad where it is."""
    return {"id": np.str_(id), "cut": np.bool_(cut), "reason": np.str_(reason), "message": np.str_(message[:200])}


def _named(parts: Sequence[tuple[int, int]], names: Sequence[str]) -> list[tuple[str, int]]:
    return [(names[stream], bucket) for stream, bucket in parts]


def _part(seed: int, name: str, stream: Stream, bucket: int) -> grain.MapDataset:
    """A stream's samples of one bucket, in a fresh order every epoch."""
    draw = functools.partial(_draw, stream.draw, bucket)
    order = grain.MapDataset.range(stream.sizes[bucket]).seed(_part_seed(seed, name, bucket)).shuffle().repeat()
    return order.random_map(draw)


def _draw(draw: Draw, bucket: int, number: int, rng: np.random.Generator) -> Sample:
    return draw(bucket, number, rng)


class HostShare(grain.transforms.DatasetSelectionMap):
    """A host's part of a global order: of every batch over all hosts, the samples at its places.

    A sample so stands at the same place of the global batch whatever the number of hosts.
    """

    def __init__(self, order: grain.transforms.DatasetSelectionMap, feed: Feed):
        self._order, self._feed = order, feed

    def __len__(self) -> int:
        return len(self._order) // self._feed.of * len(self._feed.places)

    def __getitem__(self, index: int) -> tuple[int, int]:
        feed = self._feed
        batch, sample = divmod(index, feed.batch_size)
        part, inside = divmod(sample, feed.width)
        return self._order[(batch * feed.of + feed.places[part]) * feed.width + inside]


def _repeat_first(rows: np.ndarray, times: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[:1], times, axis=0)])


def _stack(samples: Sequence[Sample], leading: tuple[int, ...]) -> Sample:
    def stack(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: stack([value[name] for value in values]) for name in values[0]}
        stacked = np.stack(values)
        return stacked.reshape(*leading, *stacked.shape[1:])

    return stack(samples)


def _part_seed(seed: int, name: str, bucket: int) -> int:
    """A seed of its own for each part, so that streams do not go through the images in step."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode()), bucket]).generate_state(1)[0])
