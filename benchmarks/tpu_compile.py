"""Compiles the full-size configs for TPU topologies, without a TPU: `python benchmarks/tpu_compile.py`.

Writes benchmarks/tpu_compile.json and the tables of docs/pods.md. Each program is compiled in a process of its own,
some minutes each on two cores. What the file has already is left, so an interrupted run goes on, and what fails is
told at the end and tried again the next time (--again starts anew; --page writes the tables and compiles nothing).
Exits with 1 where a program of a chosen setting does not compile or peaks above 85 % of a device's memory.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from npedit_jax import chips
from npedit_jax.models import layers

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "tpu_compile.json"
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- tpu_compile: begin -->", "<!-- tpu_compile: end -->"
PROGRAMS = ("student/2", "fake_score/2", "student/1", "fake_score/1", "sample")  # those that need most come first
SCALED = ("student/2", "fake_score/2")
POLICIES = (*layers.REMAT_POLICIES, "none")  # from least memory to most
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a topology.

    Attributes:
      kind: which of the page's tables it is for: "run", "scaling", "remat".
      data, fsdp: sizes of the mesh's axes.
      batch: over all devices.
      remat: policies of the student and of the fake score.
    """

    kind: str
    config: str
    topology: str
    data: int
    fsdp: int
    batch: int
    remat: tuple[str, str]
    slices: int = 1
    programs: tuple[str, ...] = PROGRAMS

    @property
    def place(self) -> str:
        """Topology, with the number of slices where there are several."""
        return f"{self.slices} x {self.topology}" if self.slices > 1 else self.topology

    @property
    def name(self) -> str:
        """Key in the results."""
        student, fake_score = self.remat
        return (
            f"{self.config} {self.place} data={self.data} fsdp={self.fsdp} batch={self.batch} "
            f"student={student} fake_score={fake_score}"
        )

    def settings(self) -> list[str]:
        """What the command line of a run adds to the config."""
        student, fake_score = self.remat
        return [
            f"--config.mesh.data={self.data}",
            f"--config.mesh.fsdp={self.fsdp}",
            f"--config.batch_size={self.batch}",
            f"--config.networks.student.options.remat={student}",
            f"--config.networks.fake_score.options.remat={fake_score}",
        ]

    def command(self, program: str) -> list[str]:
        """Compiles one program."""
        config = f"--config=configs/zimage/{self.config}.py"
        where = [f"--topology={self.topology}", f"--slices={self.slices}"]
        return ["-m", "npedit_jax.compile", config, *where, *self.settings(), f"--only={program}"]


@dataclasses.dataclass(frozen=True)
class Forward:
    """The denoiser's forward pass at 1024 x 1024 pixels, a sample a chip, parameters split over all chips.

    Its programs are named by the form of attention.
    """

    topology: str
    kind: str = "forward"
    programs: tuple[str, ...] = ("splash", "xla")

    @property
    def name(self) -> str:
        """Key in the results."""
        return f"denoiser {self.topology}"

    def command(self, program: str) -> list[str]:
        """Compiles one program."""
        return ["benchmarks/denoiser_memory.py", f"--topology={self.topology}", f"--implementation={program}"]


V5P, V6E, V5E = (
    Case("run", "npedit", "v5p:4x4x4", 4, 16, 64, ("dots_attention", "dots_attention")),
    Case("run", "npedit", "v6e:8x8", 2, 32, 64, ("attention", "dots_attention")),
    Case("run", "npedit", "v5e:16x16", 8, 32, 256, ("attention", "dots_attention")),
)
LORA_V5E, LORA_V6E = (
    Case("run", "npedit_lora", "v5e:4x4", 1, 16, 16, ("attention", "dots_attention")),
    Case("run", "npedit_lora", "v6e:4x4", 1, 16, 16, ("attention", "dots_attention")),
)
V7X = Case("run", "npedit", "tpu7x:4x4x4", 8, 16, 128, ("dots_attention", "dots_attention"))


def next_remat(policy: str) -> str:
    """The policy that keeps a little more."""
    return POLICIES[POLICIES.index(policy) + 1]


def other_remat(case: Case, student: str, fake_score: str) -> Case:
    """Other policies, for the programs of most steps: those that unroll two steps."""
    kept = {"student/2": student != case.remat[0], "fake_score/2": fake_score != case.remat[1]}
    programs = tuple(name for name, differs in kept.items() if differs)
    return dataclasses.replace(case, kind="remat", remat=(student, fake_score), programs=programs)


CASES: tuple[Case | Forward, ...] = (
    Forward("v6e:2x4"),
    V5P,
    V6E,
    V5E,
    LORA_V5E,
    LORA_V6E,
    V7X,
    # The largest programs on 16, 64 (above) and 512 chips, a sample each; and on two slices.
    Case("scaling", "npedit", "v5p:2x2x4", 1, 16, 16, V5P.remat, programs=SCALED),
    Case("scaling", "npedit", "v5p:8x8x8", 32, 16, 512, V5P.remat, programs=SCALED),
    Case("scaling", "npedit", "v6e:8x8", 4, 32, 128, V6E.remat, slices=2, programs=SCALED),
    # The policy that keeps the next thing more, and so would be faster if it fitted.
    *(other_remat(case, *map(next_remat, case.remat)) for case in (V5P, V6E, V5E, LORA_V5E, LORA_V6E)),
)


def compiler_flags() -> list[str]:
    """Those that launch/pod/train.sh hands to the compiler."""
    return re.findall(r"^ +(--xla\S+)", (ROOT / "launch" / "pod" / "xla_flags.sh").read_text(), re.MULTILINE)


def compile_program(case: Case | Forward, program: str) -> dict[str, Any] | None:
    """The report of one program; None where there is none, after telling why."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "report.json"
        command = [sys.executable, *case.command(program), f"--json={file}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "LIBTPU_INIT_ARGS": " ".join(compiler_flags())}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(done.stdout, flush=True)
        if not file.exists():
            print(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}", file=sys.stderr)
            return None
        return json.loads(file.read_text())


Results = dict[str, dict[str, Any]]


def of_kind(results: Results, *kinds: str) -> Iterable[tuple[Case, dict[str, Any]]]:
    """The cases of those tables that have results, with the report of each program."""
    for case in CASES:
        if case.kind in kinds and case.name in results:
            yield case, results[case.name]


def tables(results: Results) -> str:
    """All tables of the page."""
    parts = [
        ("Settings that fit", runs(results)),
        ("Each program", programs(results, "run", "scaling")),
        ("Other remat policies", programs(results, "remat")),
        ("More chips, a sample on each", scaling(results)),
        ("The denoiser alone at 1024 x 1024 pixels, a caption of 512 tokens", forwards(results)),
    ]
    return "\n\n".join(f"*{title}*\n\n{table}" for title, table in parts if table)


def table(columns: str, rows: list[str]) -> str:
    """In Markdown; nothing without rows."""
    return "\n".join([columns, "|---" * (columns.count("|") - 1) + "|", *rows]) if rows else ""


def runs(results: Results) -> str:
    """A row a setting whose programs are all there."""
    rows = []
    for case, reports in of_kind(results, "run"):
        made = {name: p for report in reports.values() for name, p in report["programs"].items()}
        if not set(PROGRAMS) <= set(made):
            continue
        report = next(iter(reports.values()))
        steps = {name: p for name, p in made.items() if p["runs"]}
        seconds, useful = (total(steps, value) for value in (bound, lambda p: p["useful"]))
        peak = max(p["peak"] for p in made.values())
        ratios = [
            total(part, lambda p: p["executed"]) / total(part, lambda p: p["useful"])
            for part in ({name: p for name, p in steps.items() if name.endswith(end)} for end in ("/1", "/2"))
        ]
        rows.append(
            f"| {case.config} | {case.place} | {case.data} x {case.fsdp} | {case.batch} | {', '.join(case.remat)} | "
            f"{peak / GIB:.1f} | {peak / report['memory']:.0%} | {ratios[0]:.2f}, {ratios[1]:.2f} | {seconds:.2f} | "
            f"{useful / seconds / report['peak_flops']:.0%} | "
            f"{seconds * report['steps'] * report['chips'] / 3600:.0f} |"
        )
    return table(
        "| config | topology | mesh, data x fsdp | batch | remat of student, fake score | peak GiB | of HBM | "
        "executed / useful, 1 and 2 steps | s a step | bound MFU | chip-hours |",
        rows,
    )


def total(programs: dict[str, Any], value: Any) -> float:
    """Expectation over an outer step."""
    return sum(p["runs"] * value(p) for p in programs.values())


def bound(p: dict[str, Any]) -> float:
    """Least seconds of one run of a program."""
    return max(p["times"].values())


def programs(results: Results, *kinds: str) -> str:
    """A row a program, and one for each that does not fit."""
    rows = []
    for case, reports in of_kind(results, *kinds):
        for name, report in reports.items():
            setting = f"{case.config} {case.place}, {', '.join(case.remat)}"
            rows += [f"| {setting} | {key} | {figures(p, report['memory'])} |" for key, p in report["programs"].items()]
            if not report["programs"]:
                rows.append(f"| {setting} | {name} | does not compile: {report['failures'][0][:200]} | | | | | | | |")
    return table(
        "| setting | program | temporaries, peak GiB | of HBM | useful TFLOP | executed / useful | compute s | "
        "memory s | links s | largest gather MiB |",
        rows,
    )


def figures(p: dict[str, Any], memory: float) -> str:
    """The columns of one program."""
    times = p["times"]
    return (
        f"{p['temporaries'] / GIB:.1f}, {p['peak'] / GIB:.1f} | {p['peak'] / memory:.0%} | {p['useful'] / 1e12:.0f} | "
        f"{p['executed'] / p['useful']:.2f} | {times['compute']:.2f} | {times['memory']:.2f} | "
        f"{times['interconnect'] + times['network']:.2f} | {p['largest_gather'][0] / 2**20:.0f}"
    )


def scaling(results: Results) -> str:
    """A row a program and size: memory, and the time that each axis takes to move its bytes, by itself."""
    rows = []
    chip = lambda case: (case.config, case.topology.partition(":")[0])  # noqa: E731
    compared = {chip(case) for case in CASES if case.kind == "scaling"}
    found = [
        (name, case, reports[name])
        for case, reports in of_kind(results, "run", "scaling")
        for name in SCALED
        if name in reports and chip(case) in compared
    ]
    for name, case, report in sorted(found, key=lambda item: (item[0], chip(item[1]), item[2]["chips"])):
        speed = chips.chip_of(case.topology)
        for p in report["programs"].values():
            moved = dict.fromkeys(("fsdp", "data", "data+fsdp", "slices"), 0.0)
            for key, size in p["collectives"].items():
                axis = key.partition(" over ")[2]
                moved[axis] = moved.get(axis, 0.0) + size
            rates = {axis: speed.network if axis == "slices" else speed.interconnect for axis in moved}
            times = " | ".join(f"{moved[axis] / rates[axis]:.3f}" for axis in ("fsdp", "data", "data+fsdp", "slices"))
            rows.append(
                f"| {name} | {case.config} {case.place} | {report['chips']} | {case.data} x {case.fsdp} | "
                f"{p['temporaries'] / GIB:.2f} | {times} | {p['times']['compute']:.3f} |"
            )
    return table(
        "| program | setting | chips | data x fsdp | temporaries GiB | s over fsdp | over data | over both | "
        "between slices | compute s |",
        rows,
    )


def forwards(results: Results) -> str:
    """A row a form of attention."""
    rows = [
        f"| {case.topology} | {name} | {p['arguments'] / GIB:.2f} | {p['temporaries'] / GIB:.2f} | "
        f"{p['peak'] / GIB:.2f} | {p['executed'] / p['useful']:.2f} | {p['largest_gather'][0] / 2**20:.0f} |"
        for case, reports in of_kind(results, "forward")
        for name, p in reports.items()
    ]
    return table(
        "| topology | attention | arguments GiB | temporaries GiB | peak GiB | executed / useful | "
        "largest gather MiB |",
        rows,
    )


def write_page(results: Results) -> None:
    """Puts the tables between the page's marks."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{tables(results)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="cases whose name holds this")
    parser.add_argument("--program", default="", help="programs whose name holds this")
    parser.add_argument("--again", action="store_true", help="compile what the results have already, too")
    parser.add_argument("--page", action="store_true", help="only write the page's tables")
    arguments = parser.parse_args()
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = []
    for case in CASES if not arguments.page else ():
        for program in case.programs:
            if arguments.case not in case.name or arguments.program not in program:
                continue
            if not arguments.again and program in results.get(case.name, {}):
                continue
            if (found := compile_program(case, program)) is None:
                missing.append(f"{case.name} {program} gave no report")
                continue
            results.setdefault(case.name, {})[program] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)
    failures = [
        line for _, reports in of_kind(results, "run", "scaling") for r in reports.values() for line in r["failures"]
    ]
    if failures or missing:
        sys.exit("tpu_compile: " + "\n".join([*failures, *missing]))


if __name__ == "__main__":
    main()
