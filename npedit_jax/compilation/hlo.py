"""What a compiled program does, read from its text: products, collectives and memory traffic, loops by their length.

XLA's own cost analysis counts the body of a loop once, and a network of ours is one loop over its layers.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

from npedit_jax.compilation import collectives, products
from npedit_jax.compilation.collectives import Collective
from npedit_jax.compilation.hlo_text import Array, Computation, Instruction, parse, telling

# Names of what changes no byte of the main memory, or is counted by what it calls.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier iota send recv send-done recv-done domain".split()
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Totals of a program, per device."""

    flops: float
    traffic: float  # bytes to and from the main memory
    collectives: tuple[Collective, ...]
    largest: tuple[tuple[int, str], ...]  # bytes and description of the largest arrays that it makes or is given


class Program:
    """A compiled module's text, parsed.

    Raises:
      Unreadable: from here on, also by `work`.
    """

    def __init__(self, text: str):
        with telling():
            self.computations, self.entry = parse(text)

    def work(self, mesh_shape: Mapping[str, int]) -> Work:
        """Adds up what the program does.

        Args:
          mesh_shape: size of each mesh axis, in the order in which devices are numbered.

        Of the branches of a condition the one with most products counts.
        """
        with telling():
            return self._work(mesh_shape)

    def _work(self, mesh_shape: Mapping[str, int]) -> Work:
        flops, traffic, exchanges, made = 0.0, 0.0, {}, {}
        for context, name, times in self._runs(self.entry, 1, ""):
            computation = self.computations[name]
            for instruction in computation.values():
                flops += times * products.flops(computation, instruction)
                if not self._fused(context):
                    traffic += times * self._traffic(computation, instruction)
                    given = instruction.opcode == "parameter" and name == self.entry
                    for array in instruction.results if given or instruction.opcode not in FREE else ():
                        if array.in_main_memory:
                            kind = "argument" if given else instruction.opcode
                            label = f"{array.dtype}{list(array.shape)} {kind} {instruction.source}"
                            made[label] = array.bytes
                if exchanged := collectives.read_exchange(instruction, times):
                    key = (context.partition("/fusion")[0], exchanged.source)
                    # What is sent and what arrives: of a sum that stays scattered the former is the whole.
                    exchanges[key] = max(exchanged, exchanges.get(key, exchanged), key=lambda each: each.bytes)
                elif kind := collectives.kind_of(instruction.opcode, name):
                    found = collectives.read(kind, computation, instruction, times, mesh_shape)
                    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                    # The start and the end of one that runs beside the computation each hold a copy of it.
                    key = (context.partition("/fusion")[0], channel[1] if channel else instruction.name)
                    exchanges[key] = found
        largest = sorted(((size, label) for label, size in made.items()), reverse=True)[:12]
        return Work(flops, traffic, tuple(exchanges.values()), tuple(largest))

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
        own = sum(products.flops(computation, instruction) for instruction in computation.values())
        calls = (call for instruction in computation.values() for call in self._calls(computation, instruction))
        return own + sum(repeats * self._total(callee) for callee, repeats in calls)

    def _fused(self, context: str) -> bool:
        return "/fusion" in context

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes read and written in the main memory by an instruction outside a fusion."""
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return 0.0
        if instruction.opcode == "custom-call" and not products.is_kernel(instruction):
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
