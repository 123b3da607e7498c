"""What the compiler says of each program of a run, beside what the chip can do: memory, FLOPs, roofline."""

import dataclasses
import time
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from npedit_jax import flops
from npedit_jax.chips import Chip
from npedit_jax.compilation import hlo, hlo_text
from npedit_jax.compilation.programs import Compilable, programs, shard_bytes

GIB = 2**30
LIMIT = 0.85  # of a chip's memory: the rest is the runtime's and fragmentation's


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program; figures are per device.

    Attributes:
      arguments: bytes that it reads.
      temporaries: bytes that it needs besides, at its peak.
      peak: bytes in use at its peak, with what else lies on the device during a run.
      useful: FLOPs that its results need.
      executed: FLOPs that it runs.
      traffic: bytes to and from the device's memory.
      collectives: bytes received, by "KIND over AXES".
      largest_gather: bytes and description of the largest array that a collective puts together.
      times: seconds bound by "compute", "memory" and "interconnect".
      largest: the largest arrays that it makes or is given, "MiB description".
      runs: per outer step, on average.
      compile_seconds: on the machine that compiled it.
    """

    arguments: int
    temporaries: int
    peak: int
    useful: float
    executed: float
    traffic: float
    collectives: dict[str, float]
    largest_gather: tuple[int, str]
    times: dict[str, float]
    largest: list[str]
    runs: float
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """The least time of one run: the slowest of compute, memory and interconnect, perfectly overlapped."""
        return max(self.times.values())


@dataclasses.dataclass(frozen=True)
class RunReport:
    """All programs of a run on a topology.

    Attributes:
      resident: bytes of train state and frozen networks on a device.
      memory: bytes that a device has.
      failures: why programs do not fit, one line each.
    """

    devices: int
    chips: int
    batch_size: int
    resident: int
    memory: float
    peak_flops: float
    steps: int
    programs: dict[str, ProgramReport]
    failures: list[str]

    @property
    def fits(self) -> bool:
        """Whether every program compiles and stays below the limit."""
        return not self.failures

    def step(self) -> dict[str, float]:
        """Expectations over an outer step of the run: seconds, bound MFU, executed over useful FLOPs, chip-hours."""
        made = self.programs.values()
        total = lambda value: sum(p.runs * value(p) for p in made)  # noqa: E731
        seconds = total(lambda p: p.seconds)
        useful, executed = total(lambda p: p.useful), total(lambda p: p.executed)
        if not seconds:
            return {}
        return {
            "seconds": seconds,
            "bound_mfu": useful / seconds / self.peak_flops,
            "executed_over_useful": executed / useful,
            "chip_hours": seconds * self.steps * self.chips / 3600,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return dataclasses.asdict(self) | {"step": self.step(), "fits": self.fits}


def compile_run(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    chip: Chip,
    side: tuple[int, int],
    *,
    only: str = "",
    text: epath.Path | None = None,
) -> RunReport:
    """Compiles every program of a run for the devices of the mesh; needs no weights, data or such devices.

    Args:
      side: height and width of the pictures.
      only: compiles programs whose name holds this.
      text: directory for the text of each compiled program.

    Raises:
      ValueError: no program's name holds `only`.
    """
    made, held = programs(config, mesh, side)
    if not any(only in name for name in made):
        raise ValueError(f"no program's name holds {only!r}; they are {', '.join(made)}")
    reports, failures = {}, []
    for name, program in made.items():
        if only not in name:
            continue
        try:
            file = text / f"{name.replace('/', '_')}.hlo" if text is not None else None
            reports[name] = compile_program(program, mesh, chip, held.bytes_per_device(), file)
        except jax.errors.JaxRuntimeError as error:
            failures.append(f"{name} does not compile: {_first_lines(str(error))}")
            continue
        except hlo_text.Unreadable as error:
            failures.append(f"{name} compiles, and may fit: {_first_lines(str(error))}")
            continue
        if reports[name].peak > LIMIT * chip.memory:
            largest = "; ".join(reports[name].largest[:4])
            failures.append(
                f"{name} peaks at {reports[name].peak / GIB:.2f} GiB, more than {LIMIT:.0%} of the device's "
                f"{chip.memory / GIB:.2f} GiB; largest: {largest}"
            )
    return RunReport(
        devices=mesh.size,
        chips=mesh.size // chip.devices,
        batch_size=config.batch_size,
        resident=held.bytes_per_device(),
        memory=chip.memory,
        peak_flops=chip.flops,
        steps=config.steps,
        programs=reports,
        failures=failures,
    )


def compile_program(
    program: Compilable, mesh: Mesh, chip: Chip, resident: int, text: epath.Path | None = None
) -> ProgramReport:
    """Compiles one program for the devices of the mesh.

    Args:
      resident: bytes that lie on each device whatever program runs.
      text: file for the compiled program's text.

    Raises:
      jax.errors.JaxRuntimeError: it does not compile, as where it needs more memory than there is.
    """
    start = time.monotonic()
    with jax.set_mesh(mesh):
        compiled = program.function.lower(*program.arguments).compile()
    seconds = time.monotonic() - start
    if text is not None:
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    # A program is given what it uses of the run's state, and takes over what it changes.
    throughout = max(resident + shard_bytes(program.batch), memory.argument_size_in_bytes)
    made = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    work = hlo.Program(compiled.as_text()).work(mesh.shape)
    # Where the compiler has no all-gather for a shape, it adds shards up that are zero but for one place.
    puts_together = lambda c: c.kind == "all-gather" or (c.kind == "all-reduce" and "fsdp" in c.axes)  # noqa: E731
    gathers = [(c.bytes, f"{c.dtype}{list(c.shape)} {c.source}") for c in work.collectives if puts_together(c)]
    return ProgramReport(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=throughout + made,
        useful=flops.useful(program.plain, *_unplaced(program.arguments)) / mesh.size,
        executed=work.flops,
        traffic=work.traffic,
        collectives=_by_axes(work),
        largest_gather=max(gathers, default=(0, "none")),
        times=_times(work, chip),
        largest=[f"{size / 2**20:.0f} MiB {label}" for size, label in work.largest],
        runs=program.runs,
        compile_seconds=seconds,
    )


def _unplaced(arguments: Any) -> Any:
    """The same shapes without shardings: what is counted is not laid out."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)


def _by_axes(work: hlo.Work) -> dict[str, float]:
    found: dict[str, float] = {}
    for collective in work.collectives:
        places = ["slices"] if collective.between_slices else collective.axes
        key = f"{collective.kind} over {'+'.join(places) or 'one device'}"
        found[key] = found.get(key, 0.0) + collective.moved
    return found


def _times(work: hlo.Work, chip: Chip) -> dict[str, float]:
    """Seconds of each resource by itself."""
    between = sum(c.moved for c in work.collectives if c.between_slices)
    within = sum(c.moved for c in work.collectives if not c.between_slices)
    return {
        "compute": work.flops / chip.flops,
        "memory": work.traffic / chip.bandwidth,
        "interconnect": within / chip.interconnect,
        "network": between / chip.network,
    }


def _first_lines(message: str) -> str:
    return " ".join(" ".join(message.splitlines()[:6]).split())[:600]


def text(report: RunReport, title: str) -> str:
    """The report for a reader."""
    lines = [
        f"{title}: {report.chips} chips, global batch {report.batch_size}, "
        f"{report.resident / GIB:.2f} GiB of parameters and optimizer state on each device of "
        f"{report.memory / GIB:.2f} GiB"
    ]
    for name, p in report.programs.items():
        lines += program_lines(name, p, report.memory)
    if step := report.step():
        lines.append(
            f"outer step: {step['seconds']:.2f} s at least, bound MFU {step['bound_mfu']:.0%}, executed/useful "
            f"{step['executed_over_useful']:.2f}; {step['chip_hours']:.0f} chip-hours for {report.steps} steps"
        )
    lines += [f"DOES NOT FIT: {failure}" for failure in report.failures]
    return "\n".join(lines)


def program_lines(name: str, p: ProgramReport, memory: float) -> list[str]:
    """One program for a reader; `memory` is that of a device, in bytes."""
    bound = max(p.times, key=p.times.__getitem__)
    moved = "; ".join(f"{key} {value / 1e9:.2f} GB" for key, value in sorted(p.collectives.items()))
    return [
        f"{name}: arguments {p.arguments / GIB:.2f}, temporaries {p.temporaries / GIB:.2f}, "
        f"peak {p.peak / GIB:.2f} GiB ({p.peak / memory:.0%}); compiled in {p.compile_seconds:.0f} s",
        f"  useful {p.useful / 1e12:.2f}, executed {p.executed / 1e12:.2f} TFLOP, ratio {_ratio(p):.2f}",
        f"  {moved or 'no collectives'}; largest gather {p.largest_gather[0] / 2**20:.0f} MiB",
        "  " + ", ".join(f"{key} {value:.3f} s" for key, value in p.times.items()) + f": bound by {bound}",
    ]


def _ratio(p: ProgramReport) -> float:
    return p.executed / p.useful if p.useful else float("nan")
