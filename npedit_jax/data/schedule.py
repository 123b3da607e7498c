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
    """
    shares = weights / weights.sum()
    if sizes.shape[1] == 1:  # nothing to fit: a period of at most about a thousand samples
        counts = np.maximum(1, np.rint(1000 * shares)).astype(np.int64)[:, None]
        return np.ones(1, np.int64), counts
    # A thousand periods of a share in thousandths are whole samples.
    unit = 1000 // math.gcd(samples, 1000)
    wanted = shares[:, None] * sizes / sizes.sum(axis=1, keepdims=True)
    rarest = wanted.sum(axis=0)[sizes.any(axis=0)].min()
    period = -(-int(np.clip(1 / rarest, *PERIODS)) // unit) * unit
    steps = apportion(wanted.sum(axis=0) * period, period)
    rows = apportion(shares * period * samples, period * samples)
    fitted = _fit_margins(wanted, rows, steps * samples)
    # The error of rounding one bucket goes to the next, larger one; the last one takes all of it.
    counts, error = np.zeros(sizes.shape, np.int64), rows - fitted.sum(axis=1)
    for bucket in np.argsort(steps, kind="stable"):
        target = np.where(fitted[:, bucket] > 0, fitted[:, bucket] + error, 0)
        counts[:, bucket] = apportion(target, steps[bucket] * samples)
        error += fitted[:, bucket] - counts[:, bucket]
    return steps, counts


def apportion(wanted: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of this total nearest to what is wanted; 1 at least where anything is wanted, if the total allows.

    Largest remainders; what is not wanted at all (0) gets nothing.
    """
    possible = wanted > 0
    counts = np.where(possible, np.maximum(np.floor(np.round(wanted, 9)), 1), 0).astype(np.int64)
    while (missing := int(total - counts.sum())) > 0 and possible.any():
        best = np.argsort(np.where(possible, counts - wanted, np.inf), kind="stable")[: min(missing, possible.sum())]
        counts[best] += 1
    while (missing := int(total - counts.sum())) < 0:
        counts[np.argmax(np.where(counts > (1 if counts.max() > 1 else 0), counts - wanted, -np.inf))] -= 1
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
