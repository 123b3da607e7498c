"""What devices exchange: the collectives of a compiled program, and the transfers between slices."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from npedit_jax.compilation.hlo_text import Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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


def kind_of(opcode: str, computation: str) -> str | None:
    """The kind of collective that an instruction of this computation is, if it is one."""
    name = opcode.removesuffix("-start")
    if name == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # how the TPU compiler writes one
    return name if name in KINDS else None


def read(
    kind: str, computation: Computation, instruction: Instruction, times: int, mesh_shape: Mapping[str, int]
) -> Collective:
    """A collective of that kind, run that many times, on a mesh of these axes, in the order of the devices' numbers."""
    operands = [array for name in instruction.operands if name in computation for array in computation[name].results]
    results = instruction.results
    if instruction.opcode.endswith("-start") and len(results) > len(operands):
        results = results[len(operands) :] if kind in ("all-gather", "collective-permute") else results
    whole = operands if kind in ("reduce-scatter", "all-reduce") else list(results)
    # A result may be several arrays at once; that of a permute also holds counters.
    whole = [array for array in whole if array.shape] or list(results)
    largest = max(whole, key=lambda array: array.bytes)
    groups = groups_of(instruction.attributes, math.prod(mesh_shape.values()))
    return Collective(
        kind=kind,
        axes=axes_of(groups, mesh_shape),
        group=len(groups[0]) if groups else 1,
        bytes=sum(array.bytes for array in whole) if kind != "collective-permute" else largest.bytes,
        dtype=largest.dtype,
        shape=largest.shape,
        times=times,
        source=instruction.source,
    )


def read_exchange(instruction: Instruction, times: int) -> Collective | None:
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


def groups_of(attributes: str, devices: int) -> list[list[int]]:
    """Numbers of the devices that exchange with one another."""
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


def axes_of(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    names, shape = list(mesh_shape), list(mesh_shape.values())
    varying: set[str] = set()
    for group in groups:
        places = np.stack(np.unravel_index(group, shape))
        varying |= {name for name, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1}
    return tuple(name for name in names if name in varying)
