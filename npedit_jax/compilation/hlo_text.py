"""A compiled program's text, parsed: computations of instructions, with the arrays of their results."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

WITHOUT_DIGITS = {"pred": 8, "token": 0, "opaque": 0}  # bits of an element; other types have theirs in their name


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = WITHOUT_DIGITS[self.dtype] if self.dtype in WITHOUT_DIGITS else int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8

    @property
    def in_main_memory(self) -> bool:
        """Not in a memory space of its own, as small arrays inside the chip's vector memory or on the host are."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool
    literal: int | None = None  # of a whole number's constant, and a parameter's number

    @property
    def bytes(self) -> int:
        """Of all results."""
        return sum(array.bytes for array in self.results)

    @property
    def source(self) -> str:
        """Where in our code it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = Mapping[str, Instruction]


class Unreadable(ValueError):
    """A compiled module's text has something in it that is not known here."""


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """What an unknown form of the text leads to, whatever that is, as one kind of error."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"the compiled program's text cannot be read: {type(error).__name__}: {error}") from error


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations by name, and the name of the one that the program begins with."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = None, ""
    # A kernel's instruction runs over several lines.
    # What runs on a core of its own says so behind the bracket that ends it.
    end = r"\}(?:, execution_thread=.*)?\s*$"
    for line in re.sub(rf"\n(?!  |%|ENTRY|{end}|HloModule|\s*$)", " ", text, flags=re.MULTILINE).splitlines():
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if head and "->" in line:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif re.match(end, line):
            current = None
        elif instruction := _parse_line(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no compiled module: it has no ENTRY computation")
    return computations, entry


def _parse_line(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    results = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout or "")
        for dtype, shape, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?", rest[:end])
    )
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[start:stop]))
    number = re.fullmatch(r"-?\d+", rest[start + 1 : stop]) if opcode[1] in ("constant", "parameter") else None
    literal = int(number[0]) if number else None
    return Instruction(head[2], opcode[1], results, operands, rest[stop + 1 :], bool(head[1]), literal)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"a bracket is not closed in {text[:80]!r}")
