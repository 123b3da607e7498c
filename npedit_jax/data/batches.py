"""From samples to batches: Grain datasets whose order is a pure function of the seed.

A `grain.MapDataset` of batches holds batch k under index k, however it is reached. Images go through each stream in an
order shuffled anew every epoch; streams (one per edit type, say) are interleaved in exact proportions; everything that
is drawn for a sample comes from the seed, the stream and the sample's place in it.

Shapes: B batch, L text tokens, Q questions per sample, S tokens of a question's prompt, T inner batches.
"""

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from npedit_jax.data import packing
from npedit_jax.data import questions as questions_lib
from npedit_jax.data.tokenize import QuestionTokens, ScorerTokenizer, TextTokenizer

Sample = dict[str, Any]
Draw = Callable[[int, np.random.Generator], Sample]  # (image number, rng) -> one sample


@dataclasses.dataclass(frozen=True)
class Feed:
    """How samples become batches.

    Attributes:
      seed: of the order and of everything drawn.
      batch_size: samples in a batch of this host, B.
      host: this host's number and the number of hosts; together they consume one global order.
      inner_batches: T: batches are [T, B, ...]; 0 for plain batches [B, ...].
    """

    seed: int
    batch_size: int
    host: tuple[int, int] = (0, 1)
    inner_batches: int = 0


def batches(streams: Mapping[str, tuple[float, Draw]], images: int, feed: Feed) -> grain.MapDataset:
    """Batches from streams, name -> (weight, draw), each going through all images in an order of its own."""
    streams = {name: stream for name, stream in sorted(streams.items()) if stream[0] > 0}
    if not streams:
        raise ValueError("no stream has a weight above 0; give at least one")
    parts = [
        grain.MapDataset.range(images).seed(_stream_seed(feed.seed, name)).shuffle().repeat().random_map(draw)
        for name, (_, draw) in streams.items()
    ]
    order = Interleave([weight for weight, _ in streams.values()], feed.seed)
    mixed = grain.MapDataset.select_from_datasets(parts, HostShare(order, feed))
    inner = max(1, feed.inner_batches)
    leading = (inner, feed.batch_size) if feed.inner_batches else (feed.batch_size,)
    stack = functools.partial(_stack, leading=leading)
    return mixed.batch(inner * feed.batch_size, drop_remainder=True, batch_fn=stack)


def iterate(dataset: grain.MapDataset, *, threads: int = 1, buffer: int = 4) -> grain.DatasetIterator:
    """Iterates from batch 0, `threads` preparing up to `buffer` batches ahead; has get_state and set_state."""
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)))


class TextCache(dict):
    """Tokens of texts, each tokenized once: text -> (ids int32 [L], mask bool [L])."""

    def __init__(self, tokenizer: TextTokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, mask, cut = self._tokenizer([text])
        if cut[0]:
            raise ValueError(f"a text does not fit in {self._tokenizer.length} tokens, raise the text length: {text!r}")
        self[text] = ids[0], mask[0]
        return self[text]

    def fields(self, name: str, text: str) -> Sample:
        """The text's ids and mask under `name`_ids and `name`_mask."""
        ids, mask = self[text]
        return {f"{name}_ids": ids, f"{name}_mask": mask}


class QuestionCache(dict):
    """Prompts of questions, each tokenized once: (text, images) -> its row of QuestionTokens."""

    def __init__(self, tokenizer: ScorerTokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, key: tuple[str, tuple[int, ...]]) -> QuestionTokens:
        text, images = key
        tokens = self._tokenizer([questions_lib.Question("", text, images, 1.0)])
        if tokens.cut[0]:
            raise ValueError(
                f"a question does not fit in {self._tokenizer.length} tokens, raise the question length: {text!r}"
            )
        self[key] = QuestionTokens(*(field[0] for field in tokens))
        return self[key]

    def fields(self, asked: Sequence[questions_lib.Question], places: int, packed_length: int = 0) -> Sample:
        """The prompts of one sample's questions, as the scorer takes them.

        Args:
          asked: at least one question.
          places: Q; those beyond the questions repeat the first one.
          packed_length: S of one row for all of them, see `data.packing`; 0 gives each a row of its own.

        Returns:
          "question_ids", "question_mask" and "image_index" [Q, L]; or "packed_ids", "packed_positions",
          "packed_segments" and "packed_image_index" [S], and "answer_place" [Q].
        """
        rows, repeats = [self[question.text, question.images] for question in asked], places - len(asked)
        if packed_length:
            row = packing.pack(rows, packed_length)
            fields = {f"packed_{name}": value for name, value in row._asdict().items()}
            return fields | {"answer_place": _repeat_first(fields.pop("packed_answer_place"), repeats)}
        ids, mask, image_index, _ = (_repeat_first(np.stack(field), repeats) for field in zip(*rows, strict=True))
        return {"question_ids": ids, "question_mask": mask, "image_index": image_index}


class Interleave(grain.transforms.DatasetSelectionMap):
    """Which stream, and which of its samples, stands at each place: exact shares over every period.

    Shares are rounded to thousandths, so a period has at most about a thousand places. Each period has an order of its
    own: in a fixed one, the same part of every step's batch could miss a stream for ever.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        shares = [max(1, round(1000 * weight / sum(weights))) for weight in weights]
        self._counts = [share // math.gcd(*shares) for share in shares]
        self._seed = seed
        self._order = functools.lru_cache(maxsize=16)(self._draw_order)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        period, place = divmod(index, sum(self._counts))
        stream, rank = self._order(period)[place]
        return stream, period * self._counts[stream] + rank

    def _draw_order(self, period: int) -> list[tuple[int, int]]:
        """(stream, rank within the period's samples of that stream) at each place of a period."""
        streams = np.repeat(np.arange(len(self._counts)), self._counts)
        streams = np.random.default_rng([self._seed, period]).permutation(streams).tolist()
        ranks = [iter(range(count)) for count in self._counts]
        return [(stream, next(ranks[stream])) for stream in streams]


class HostShare(grain.transforms.DatasetSelectionMap):
    """A host's part of a global order: of every batch over all hosts, B places in a row.

    A sample so stands at the same place of the global batch whatever the number of hosts.
    """

    def __init__(self, order: grain.transforms.DatasetSelectionMap, feed: Feed):
        self._order, self._size = order, feed.batch_size
        self._number, self._hosts = feed.host

    def __len__(self) -> int:
        return len(self._order) // self._hosts

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, place = divmod(index, self._size)
        return self._order[(batch * self._hosts + self._number) * self._size + place]


def _repeat_first(rows: np.ndarray, times: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[:1], times, axis=0)])


def _stack(samples: Sequence[Sample], leading: tuple[int, ...]) -> Sample:
    stacked = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return {key: value.reshape(*leading, *value.shape[1:]) for key, value in stacked.items()}


def _stream_seed(seed: int, name: str) -> int:
    """A seed of its own for each stream, so that streams do not go through the images in step."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
