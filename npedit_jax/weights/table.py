"""The name-mapping table: which Hugging Face tensor is which Flax parameter, and how the two are laid out."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """The two directions of one change of axes; each undoes the other exactly, and neither copies."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_source: Callable[[np.ndarray], np.ndarray]


LAYOUTS = {
    "copy": Layout(lambda x: x, lambda x: x),
    "dense": Layout(np.transpose, np.transpose),  # [out, in] <-> [in, out]
    "conv": Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW <-> HWIO
    "leading": Layout(lambda x: x[0], lambda x: x[None]),  # an axis of one in front <-> none
}
RANKS = {"dense": 2, "conv": 4}  # axes of a parameter that the layout can have; the others take any


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a mapping table, read from left to right on load and from right to left on save.

    Attributes:
      source: Hugging Face tensor name; "{i}" runs over the layers of a stacked parameter.
      target: "/"-joined Flax parameter path, e.g. "layers/attention/query/kernel".
      layout: a key of `LAYOUTS`.
      layers: number of layers of a stacked parameter, stacked along a new leading axis; 0 = not stacked.
      part, parts: the parameter is piece `part` of `parts` equal ones along the source's first axis, as query, key and
        value of a fused projection are. The other pieces have rows of their own with the same source.
      like: of a tensor that the module has no parameter for, the path of one of the same shape (of one layer). It is
        dropped on load unless asked for, may be absent from the checkpoint, and its target starts with "unused/".
    """

    source: str
    target: str
    layout: str = "copy"
    layers: int = 0
    part: int = 0
    parts: int = 1
    like: str = ""

    @property
    def unused(self) -> bool:
        """Whether the module has no such parameter."""
        return bool(self.like)

    def names(self) -> list[str]:
        """Returns the Hugging Face names of all layers."""
        return [self.source.replace("{i}", str(i)) for i in range(self.layers)] if self.layers else [self.source]

    def to_flax(self, x: np.ndarray) -> np.ndarray:
        """Returns the parameter (of one layer) that lies in the source tensor `x`."""
        if self.parts > 1:
            rows = x.shape[0] // self.parts
            x = x[self.part * rows : (self.part + 1) * rows]
        return LAYOUTS[self.layout].to_flax(x)

    def to_source(self, x: np.ndarray) -> np.ndarray:
        """Returns the source tensor, or its piece, of the parameter `x` (of one layer): the inverse of `to_flax`."""
        return LAYOUTS[self.layout].to_source(x)

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the whole source tensor, given the parameter's (without the layer axis)."""
        # A broadcast scalar has any shape and no memory: the layouts work on it as on the real array.
        piece = self.to_source(np.broadcast_to(np.int8(0), shape)).shape
        return (piece[0] * self.parts, *piece[1:]) if self.parts > 1 else piece


def unused_shapes(table: Iterable[Row], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every unused parameter by its path, given those of the module's parameters."""
    stacked = {row.target for row in table if row.layers}
    found = {}
    for row in table:
        if row.unused:
            one = shapes[row.like][1 if row.like in stacked else 0 :]
            found[row.target] = (row.layers, *one) if row.layers else one
    return found


def check_table(table: Iterable[Row], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns what is wrong with a table, given the shapes of the module's parameters by path.

    Every parameter has exactly one row, every tensor is used exactly once, layouts exist and fit the parameters.
    """
    table = list(table)
    targets = collections.Counter(row.target for row in table)
    problems = [f"target {target} has {n} rows" for target, n in targets.items() if n > 1]
    problems += [f"target {path} {list(shapes[path])} has no row" for path in sorted(shapes.keys() - targets.keys())]
    for row in table:
        problems += _check_row(row, shapes)
    pieces = collections.defaultdict(list)
    for row in table:
        for name in row.names():
            pieces[name].append(row)
    for name, rows in pieces.items():
        if sorted((row.part, row.parts) for row in rows) != [(n, rows[0].parts) for n in range(rows[0].parts)]:
            found = ", ".join(f"{row.target} (piece {row.part} of {row.parts})" for row in rows)
            problems.append(f"source {name} is not used exactly once: {found}")
    return problems


def _check_row(row: Row, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    what = f"source {row.source} -> target {row.target}"
    if row.layout not in LAYOUTS:
        return [f"{what}: layout {row.layout!r}; known are {list(LAYOUTS)}"]
    if row.unused != row.target.startswith("unused/"):
        return [f"{what}: unused rows, and only they, go to unused/"]
    if row.unused:
        return [] if row.like in shapes else [f"{what}: it is like {row.like}, which the module does not have"]
    if row.target not in shapes:
        return [f"{what}: the module has no such parameter"]
    shape = shapes[row.target]
    if row.layers and shape[:1] != (row.layers,):
        return [f"{what} {list(shape)}: should stack {row.layers} layers"]
    rank = len(shape) - bool(row.layers)
    if RANKS.get(row.layout, rank) != rank:
        return [f"{what} {list(shape)}: layout {row.layout!r} needs {RANKS[row.layout]} axes"]
    return []
