"""What a compiled program does, read from its text: products, collectives and memory traffic, loops by their length.

XLA's own cost analysis counts the body of a loop once, and a network of ours is one loop over its layers.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

WITHOUT_DIGITS = {"pred": 8, "token": 0, "opaque": 0}  # bits of an element; other types have theirs in their name
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Names of what changes no byte of the main memory, or is counted by what it calls.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier iota send recv send-done recv-done domain".split()
)


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


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, how often it runs, and over which axes of the mesh."""

    kind: str
    axes: tuple[str, ...]
    group: int  # devices that take part
    bytes: int  # of the gathered or summed array on one device
    dtype: str
    shape: tuple[int, ...]
    times: int
    source: str
    between_slices: bool = False  # over the data centre's network

    @property
    def moved(self) -> float:
        """Bytes that a device receives over all runs, by the best algorithm on a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.bytes * factor * self.times


@dataclasses.dataclass(frozen=True)
class Work:
    """Totals of a program, per device."""

    flops: float
    traffic: float  # bytes to and from the main memory
    collectives: tuple[Collective, ...]
    largest: tuple[tuple[int, str], ...]  # bytes and description of the largest arrays that it makes or is given


class Unreadable(ValueError):
    """A compiled module's text has something in it that is not known here."""


class Program:
    """A compiled module's text, parsed.

    Raises:
      Unreadable: from here on, also by `work`.
    """

    def __init__(self, text: str):
        with _telling():
            self.computations, self.entry = _parse(text)

    def work(self, mesh_shape: Mapping[str, int]) -> Work:
        """Adds up what the program does.

        Args:
          mesh_shape: size of each mesh axis, in the order in which devices are numbered.

        Of the branches of a condition the one with most products counts.
        """
        with _telling():
            return self._work(mesh_shape)

    def _work(self, mesh_shape: Mapping[str, int]) -> Work:
        flops, traffic, collectives, made = 0.0, 0.0, {}, {}
        for context, name, times in self._runs(self.entry, 1, ""):
            computation = self.computations[name]
            for instruction in computation.values():
                flops += times * self._flops(computation, instruction)
                if not self._fused(context):
                    traffic += times * self._traffic(computation, instruction)
                    given = instruction.opcode == "parameter" and name == self.entry
                    for array in instruction.results if given or instruction.opcode not in FREE else ():
                        if array.in_main_memory:
                            kind = "argument" if given else instruction.opcode
                            label = f"{array.dtype}{list(array.shape)} {kind} {instruction.source}"
                            made[label] = array.bytes
                if exchanged := _read_exchange(instruction, times):
                    key = (context.partition("/fusion")[0], exchanged.source)
                    # What is sent and what arrives: of a sum that stays scattered the former is the whole.
                    collectives[key] = max(exchanged, collectives.get(key, exchanged), key=lambda each: each.bytes)
                elif kind := _collective(instruction.opcode, name):
                    found = self._read_collective(kind, computation, instruction, times, mesh_shape)
                    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                    # The start and the end of one that runs beside the computation each hold a copy of it.
                    key = (context.partition("/fusion")[0], channel[1] if channel else instruction.name)
                    collectives[key] = found
        largest = sorted(((size, label) for label, size in made.items()), reverse=True)[:12]
        return Work(flops, traffic, tuple(collectives.values()), tuple(largest))

    def _runs(self, name: str, times: int, context: str) -> Iterator[tuple[str, str, int]]:
        """(how it is reached, computation, number of runs) of everything that runs."""
        yield context, name, times
        for instruction in self.computations[name].values():
            for callee, repeats in self._calls(self.computations[name], instruction):
                mark = "loop" if instruction.opcode in ("while", "conditional", "call") else "fusion"
                yield from self._runs(callee, times * repeats, f"{context}/{mark}:{instruction.name}")

    def _calls(self, computation: Computation, instruction: Instruction) -> list[tuple[str, int]]:
        text = instruction.attributes
        if instruction.opcode == "while":
            condition, body = (re.search(rf"{part}=%?([\w.\-]+)", text)[1] for part in ("condition", "body"))
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', text)
            return [(body, int(known[1]) if known else self._trip_count(computation, instruction, condition, body))]
        if instruction.opcode == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", text)
            names = names[1].split(",") if names else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text)
            return [(max((name.strip(" %") for name in names), key=self._total), 1)]
        if instruction.opcode in ("fusion", "call", "async-start", "call-start"):
            return [(name, 1) for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text)]
        return []

    def _trip_count(self, computation: Computation, loop: Instruction, condition: str, body: str) -> int:
        """Of a loop that counts up from one constant to another: not from 0 where its first round stands before it."""
        checks, steps = self.computations[condition], self.computations[body]
        compare = next(inner for inner in checks.values() if inner.root)
        try:
            counter, limit = (checks[name] for name in compare.operands)
            place = int(re.search(r"index=(\d+)", counter.attributes)[1])
            step = steps[next(inner for inner in steps.values() if inner.root).operands[place]]
            (amount,) = (steps[name].literal for name in step.operands if steps[name].opcode == "constant")
            start = computation[computation[loop.operands[0]].operands[place]]
            while start.opcode in ("copy", "bitcast"):
                start = computation[start.operands[0]]
            count = -(-(limit.literal - start.literal) // amount)
        except (KeyError, StopIteration, ValueError, TypeError) as error:
            raise ValueError(f"loop {loop.name} has no known trip count: {loop.source}") from error
        opcodes = (compare.opcode, step.opcode, start.opcode, limit.opcode)
        if opcodes != ("compare", "add", "constant", "constant") or "direction=LT" not in compare.attributes:
            raise ValueError(f"loop {loop.name} has no known trip count: {loop.source}")
        return count

    @functools.cache  # noqa: B019  a program lives as long as its report
    def _total(self, name: str) -> float:
        computation = self.computations[name]
        own = sum(self._flops(computation, instruction) for instruction in computation.values())
        calls = (call for instruction in computation.values() for call in self._calls(computation, instruction))
        return own + sum(repeats * self._total(callee) for callee, repeats in calls)

    def _fused(self, context: str) -> bool:
        return "/fusion" in context

    def _flops(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode == "dot":
            return _dot_flops(computation, instruction)
        if instruction.opcode == "convolution":
            return _convolution_flops(computation, instruction)
        if instruction.opcode == "custom-call" and _is_kernel(instruction):
            return _kernel_flops(computation, instruction)
        return 0.0

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes read and written in the main memory by an instruction outside a fusion."""
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return 0.0
        if instruction.opcode == "custom-call" and not _is_kernel(instruction):
            return 0.0  # reserves memory, renames it, or stands for what is counted elsewhere
        if instruction.opcode == "fusion":
            return self._fusion_traffic(computation, instruction)
        if instruction.opcode.endswith("-start"):
            return _started_traffic(computation, instruction)
        if instruction.opcode in ("dynamic-slice", "gather"):
            return 2.0 * _main_bytes(instruction.results)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2.0 * _main_bytes(
                computation[instruction.operands[-2 if instruction.opcode[0] == "d" else -1]].results
            )
        read = sum(_main_bytes(computation[name].results) for name in instruction.operands if name in computation)
        return read + _main_bytes(instruction.results)

    def _fusion_traffic(self, computation: Computation, instruction: Instruction) -> float:
        (callee, _), *_ = self._calls(computation, instruction)
        body = self.computations[callee]
        sources = [computation.get(name) for name in instruction.operands]
        read = sum(
            self._read(callee, number)
            for number, source in enumerate(sources)
            if source is not None and _main_bytes(source.results)
        )
        root = next(inner for inner in body.values() if inner.root)
        made = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        pairs = zip(instruction.results, made, strict=False)
        return read + sum(self._written(callee, inner) for array, inner in pairs if array.in_main_memory)

    @functools.cache  # noqa: B019  a program lives as long as its report
    def _read(self, name: str, number: int) -> int:
        """Bytes that a fused computation reads of its parameter: of a stack that it slices, the slices."""
        body = self.computations[name]
        parameter = next(inner for inner in body.values() if inner.opcode == "parameter" and inner.literal == number)
        return self._used(name, parameter)

    def _used(self, name: str, array: Instruction) -> int:
        used = 0
        for user in self._users(name).get(array.name, ()):
            if user.opcode in ("dynamic-slice", "gather") and user.operands[0] == array.name:
                used += user.bytes
            elif user.opcode == "bitcast":
                used += self._used(name, user)
            elif user.opcode == "fusion":
                (callee, _), *_ = self._calls(self.computations[name], user)
                used += sum(self._read(callee, place) for place, x in enumerate(user.operands) if x == array.name)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != array.name:
                return array.bytes
        return min(used, array.bytes)

    def _written(self, name: str, made: Instruction) -> int:
        """Bytes that a fused computation writes of a result: of a stack that it updates, the update."""
        body = self.computations[name]
        if made.opcode == "dynamic-update-slice":
            return body[made.operands[1]].bytes
        if made.opcode == "bitcast":
            return self._written(name, body[made.operands[0]])
        if made.opcode == "fusion" and len(made.results) == 1:
            (callee, _), *_ = self._calls(body, made)
            return self._written(callee, next(inner for inner in self.computations[callee].values() if inner.root))
        return made.bytes

    @functools.cache  # noqa: B019
    def _users(self, name: str) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for inner in self.computations[name].values():
            for operand in set(inner.operands):
                found.setdefault(operand, []).append(inner)
        return found

    def _read_collective(
        self, kind: str, computation: Computation, instruction: Instruction, times: int, mesh_shape: Mapping[str, int]
    ) -> Collective:
        operands = [
            array for name in instruction.operands if name in computation for array in computation[name].results
        ]
        results = instruction.results
        if instruction.opcode.endswith("-start") and len(results) > len(operands):
            results = results[len(operands) :] if kind in ("all-gather", "collective-permute") else results
        whole = operands if kind in ("reduce-scatter", "all-reduce") else list(results)
        # A result may be several arrays at once; that of a permute also holds counters.
        whole = [array for array in whole if array.shape] or list(results)
        largest = max(whole, key=lambda array: array.bytes)
        groups = _groups(instruction.attributes, math.prod(mesh_shape.values()))
        return Collective(
            kind=kind,
            axes=_axes(groups, mesh_shape),
            group=len(groups[0]) if groups else 1,
            bytes=sum(array.bytes for array in whole) if kind != "collective-permute" else largest.bytes,
            dtype=largest.dtype,
            shape=largest.shape,
            times=times,
            source=instruction.source,
        )


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """What an unknown form of the text leads to, whatever that is, as one kind of error."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"the compiled program's text cannot be read: {type(error).__name__}: {error}") from error


def _is_kernel(instruction: Instruction) -> bool:
    return "tpu_custom_call" in instruction.attributes


def _collective(opcode: str, computation: str) -> str | None:
    name = opcode.removesuffix("-start")
    if name == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # how the TPU compiler writes one
    return name if name in COLLECTIVES else None


def _read_exchange(instruction: Instruction, times: int) -> Collective | None:
    """What a transfer between slices is part of, which the compiler leaves to the runtime; None for anything else."""
    attributes = dict(re.findall(r'_(xla_\w+)="([^"]*)"', instruction.attributes))
    if instruction.opcode not in ("send", "recv") or "xla_megascale_transfer_type" not in attributes:
        return None
    kind = attributes["xla_megascale_transfer_type"].lower().replace("_", "-")
    (slices,) = re.findall(r"^\{([^}]*)\}x", attributes["xla_megascale_target"])
    ranges = [[int(end) for end in part.split(":")] for part in slices.split(",")]
    largest = max(instruction.results, key=lambda array: array.bytes)
    return Collective(
        kind=kind,
        axes=("data",),  # along which alone slices lie
        group=sum(ends[-1] - ends[0] + 1 for ends in ranges),
        bytes=largest.bytes,
        dtype=largest.dtype,
        shape=largest.shape,
        times=times,
        source=attributes["xla_host_transfer_rendezvous"],
        between_slices=True,
    )


def _started_traffic(computation: Computation, instruction: Instruction) -> float:
    """Of a copy, slice or collective that runs beside the computation: its results also name its operands."""
    sources = [array for name in instruction.operands if name in computation for array in computation[name].results]
    named = [array for array in instruction.results if array.shape]  # without counters
    if len(named) > len(sources):
        named = named[: len(sources)] if instruction.opcode == "copy-start" else named[len(sources) :]
    read = named if instruction.opcode == "slice-start" else sources
    from_main = sum(array.bytes for array, source in zip(read, sources, strict=False) if source.in_main_memory)
    return from_main + _main_bytes(named)


def _main_bytes(arrays: Sequence[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_main_memory)


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
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


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
    left = computation[instruction.operands[0]].results[0].shape
    contracted = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    return 2.0 * math.prod(instruction.results[0].shape) * math.prod(left[i] for i in contracted)


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Products with a real input only: neither padding nor the holes of a dilated input count.

    The TPU compiler writes matrix products as convolutions, batched ones with the batch as a dilated dimension.
    """
    left, right = (computation[name].results[0].shape for name in instruction.operands[:2])
    out = instruction.results[0].shape
    of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    for position, label in enumerate(sorted(set(of_out) - {"b", "f"})):
        pick = lambda name, default: int(fields[name].split("x")[position]) if name in fields else default  # noqa: E731, B023
        low = int(fields["pad"].split("x")[position].split("_")[0]) if "pad" in fields else 0
        pairs *= _valid_pairs(
            left[of_left.index(label)], right[of_right.index(label)], out[of_out.index(label)],
            pick("stride", 1), low, pick("lhs_dilate", 1), pick("rhs_dilate", 1),
        )  # fmt: skip
    groups = int((re.search(r"batch_group_count=(\d+)", instruction.attributes) or [0, 1])[1])
    features, batch = right[of_right.index("i")], left[of_left.index("b")]
    return 2.0 * features * out[of_out.index("f")] * (batch // groups) * pairs


@functools.cache
def _valid_pairs(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """Pairs of an output and a kernel position that meet an element of the input."""
    places = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * kernel_dilate
    return int(((places >= 0) & (places <= (size - 1) * dilate) & (places % dilate == 0)).sum())


def _kernel_flops(computation: Computation, instruction: Instruction) -> float:
    """Of the flash attention kernels, by their name: two products forward, three and four of the two backward ones."""
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.attributes + instruction.name)
    if not found:
        return 0.0
    arrays = [a for name in instruction.operands for a in computation[name].results if a.dtype in ("bf16", "f32")]
    queries, keys = (next(a.shape for a in arrays[i:] if len(a.shape) >= 3) for i in (0, 1))
    pairs = math.prod(queries[:-2]) * queries[-2] * keys[-2] * queries[-1]
    return {"fwd": 4.0, "dq": 6.0, "dkv": 8.0}[found[1]] * pairs


def _groups(attributes: str, devices: int) -> list[list[int]]:
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dimensions = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dimensions))
        return np.arange(math.prod(dimensions)).reshape(dimensions).transpose(order).reshape(shape).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    )
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = [name for name in re.findall(r"'(\w+)'", named[4]) if name in sizes]
        outside = [name for name in sizes if name not in inside]
        numbers = np.arange(math.prod(sizes.values()))
        if named[2]:
            numbers = numbers.reshape([int(n) for n in named[2].split(",")])
            numbers = numbers.transpose([int(n) for n in named[3].split(",")] if named[3] else None)
        numbers = numbers.reshape(list(sizes.values()))
        order = [list(sizes).index(name) for name in (*outside, *inside)]
        return numbers.transpose(order).reshape(-1, math.prod(sizes[name] for name in inside)).tolist()
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    return [list(range(devices))]


def _axes(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    names, shape = list(mesh_shape), list(mesh_shape.values())
    varying: set[str] = set()
    for group in groups:
        places = np.stack(np.unravel_index(group, shape))
        varying |= {name for name, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1}
    return tuple(name for name in names if name in varying)
