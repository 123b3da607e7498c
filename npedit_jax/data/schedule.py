"""Which sample stands where: one global order, a pure function of the seed and the place in it.

All samples of a step come from one resolution bucket. Over every period of steps, each bucket has a fixed number of
steps and each stream (an edit type of a source, say) a fixed number of samples, and within a stream every bucket comes
up as often as it holds samples: so all parts of a stream are used up at the same time.

Shapes: S streams, R buckets.
"""

import functools
import math
import sys
from collections.abc import Sequence

import grain
import numpy as np

# Steps of a period, least and most: a bucket has one step in it at least, so short periods show rare buckets too often.
PERIODS = (200, 4000)
_BLOCK = 1100  # samples over which streams keep their shares
_LONGEST = 10_000  # samples that are looked through for the shortest period of whole shares
_PRECISION = 100_000  # samples of a period whose shares are never whole: shares to five decimals still are


class Interleave(grain.transforms.DatasetSelectionMap):
    """Which stream, and which of its samples, stands at each place: exact counts over every period.

    A long period is cut into blocks that each have all streams' shares, to one sample. Each block has an order of its
    own: in a fixed one, the same part of every step's batch could miss a stream for ever.
    """

    def __init__(self, counts: Sequence[int], seed: int, key: int = 0):
        """`counts` are each stream's samples in a period; `key` makes orders that differ under one seed."""
        self._counts = np.array(counts, np.int64) // math.gcd(*counts)
        self._seed, self._key = seed, key
        blocks = -(-int(self._counts.sum()) // _BLOCK)
        # Samples of each stream before each block, [blocks + 1, S].
        self._before = np.arange(blocks + 1)[:, None] * self._counts // blocks
        self._starts = self._before.sum(axis=1)
        self._order = functools.lru_cache(maxsize=16)(self._draw_order)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        period, place = divmod(index, int(self._starts[-1]))
        block = int(np.searchsorted(self._starts, place, side="right")) - 1
        stream, rank = self._order(period, block)[place - int(self._starts[block])]
        return stream, period * int(self._counts[stream]) + rank

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=16)(self._draw_order)

    def _draw_order(self, period: int, block: int) -> list[tuple[int, int]]:
        """(stream, rank within the period's samples of that stream) at each place of a block."""
        blocks = len(self._starts) - 1
        counts = self._before[block + 1] - self._before[block]
        rng = np.random.default_rng([self._seed, period * blocks + block, self._key])
        streams = rng.permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
        ranks = [
            iter(range(first, last)) for first, last in zip(*self._before[block : block + 2].tolist(), strict=True)
        ]
        return [(stream, next(ranks[stream])) for stream in streams]


class Schedule(grain.transforms.DatasetSelectionMap):
    """Which part (a stream's samples of one bucket), and which of its samples, stands at each place of the order.

    Attributes:
      parts: (stream, bucket) of each part.
    """

    def __init__(self, weights: Sequence[float], sizes: np.ndarray, samples: int, seed: int):
        """Plans the order.

        Args:
          weights: [S], share of each stream in any unit.
          sizes: [S, R], samples that there are.
          samples: in a step, over all hosts.
          seed: of the order.

        Raises:
          ValueError: a stream without samples.
        """
        sizes = np.asarray(sizes, np.int64)
        if not sizes.sum(axis=1).all() or min(weights) <= 0:
            raise ValueError(
                f"every stream needs samples and a weight; found sizes {sizes.tolist()}, weights {weights}"
            )
        self._samples = samples
        steps, counts = plan(np.array(weights, np.float64), sizes, samples)
        used = np.flatnonzero(steps)
        self._buckets = Interleave(steps[used].tolist(), seed, key=1 + len(steps))
        self._bucket_numbers = used.tolist()
        self._streams, self.parts = [], []
        self._part: dict[tuple[int, int], int] = {}
        for bucket in used.tolist():
            streams = np.flatnonzero(counts[:, bucket])
            order = Interleave(counts[streams, bucket].tolist(), seed, key=bucket)
            self._streams.append((order, streams.tolist()))
            for stream in streams.tolist():
                self._part[stream, bucket] = len(self.parts)
                self.parts.append((stream, bucket))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, place = divmod(index, self._samples)
        chosen, visit = self._buckets[step]
        order, streams = self._streams[chosen]
        stream, rank = order[visit * self._samples + place]
        return self._part[streams[stream], self._bucket_numbers[chosen]], rank


def plan(weights: np.ndarray, sizes: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps of each bucket [R] in a period, and samples of each stream in each bucket [S, R].

    The samples of a bucket are in the ratio of the counts; where there are several buckets they are the period's own.
    Every bucket that a stream has samples of comes up for it, however rare.
    """
    shares = weights / weights.sum()
    whole = _whole_period(shares)
    if sizes.shape[1] == 1:
        return np.ones(1, np.int64), _cumulative(shares, max(whole, len(shares)))[:, None]
    wanted = shares[:, None] * sizes / sizes.sum(axis=1, keepdims=True)
    least = -(-(sizes > 0).sum(axis=0) // samples)  # steps in which all streams of a bucket find a place
    rarest = wanted.sum(axis=0)[sizes.any(axis=0)].min()
    unit = whole // math.gcd(samples, whole)
    period = -(-max(int(np.clip(1 / rarest, *PERIODS)), int(least.sum())) // unit) * unit
    steps = apportion(wanted.sum(axis=0) * period, period, least)
    rows = _cumulative(shares, period * samples)
    fitted = _fit_margins(wanted, rows, steps * samples)
    # The error of rounding one bucket goes to the next, larger one; the last one takes all of it.
    counts, error = np.zeros(sizes.shape, np.int64), rows - fitted.sum(axis=1)
    for bucket in np.argsort(steps, kind="stable"):
        there = (sizes[:, bucket] > 0).astype(np.int64)
        counts[:, bucket] = apportion((fitted[:, bucket] + error) * there, steps[bucket] * samples, there)
        error += fitted[:, bucket] - counts[:, bucket]
    return steps, counts


def apportion(wanted: np.ndarray, total: int, least: np.ndarray) -> np.ndarray:
    """Whole numbers of this total nearest to what is wanted, but at least `least`: largest remainders.

    Where `least` is 0 nothing is given; `total` is the sum of `least` at least.
    """
    counts = np.maximum(np.floor(np.round(wanted, 9)).astype(np.int64), least)
    while (missing := int(total - counts.sum())) > 0:
        best = np.argsort(np.where(least > 0, counts - wanted, np.inf), kind="stable")[
            : min(missing, (least > 0).sum())
        ]
        counts[best] += 1
    while (missing := int(counts.sum() - total)) > 0:
        surplus = np.where(counts > least, counts - wanted, -np.inf)
        counts[np.argsort(-surplus, kind="stable")[: min(missing, (counts > least).sum())]] -= 1
    return counts


def _whole_period(shares: np.ndarray) -> int:
    """The fewest samples in which every share is a whole number; _PRECISION where that is too many."""
    samples = np.arange(1, _LONGEST + 1)[:, None] * shares
    whole = np.flatnonzero(abs(samples - np.rint(samples)).max(axis=1) < 1e-6)
    return int(whole[0]) + 1 if len(whole) else _PRECISION


def _cumulative(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of this total, their running sums nearest to those of the shares, and none 0.

    So what streams that stand side by side have together (an edit type's in several sets) is rounded once.
    """
    counts = np.diff(np.rint(np.round(np.cumsum(shares) * total, 6)), prepend=0).astype(np.int64)
    for stream in np.flatnonzero(counts == 0):
        counts[stream] += 1
        counts[np.argmax(counts)] -= 1
    return counts


def _fit_margins(start: np.ndarray, rows: np.ndarray, columns: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Scales rows and columns of a table in turn until they sum to what is given (columns exactly)."""
    table = np.where(columns > 0, start, 0.0)
    for _ in range(rounds):
        sums = table.sum(axis=1)
        table = table * (rows / np.where(sums > 0, sums, 1))[:, None]
        sums = table.sum(axis=0)
        table = table * (columns / np.where(sums > 0, sums, 1))
    return table
