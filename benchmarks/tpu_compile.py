"""Compiles the full-size configs for TPU topologies, without a TPU: `python benchmarks/tpu_compile.py`.

Writes benchmarks/tpu_compile.json and the tables of docs/pods.md. Each program is compiled in a process of its own,
some minutes each on two cores; what the file has already is left, so an interrupted run goes on (--again starts anew).
Exits with 1 where a program does not compile or peaks above 85 % of a device's memory.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "tpu_compile.json"
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- tpu_compile: begin -->", "<!-- tpu_compile: end -->"
PROGRAMS = ("fake_score/1", "fake_score/2", "student/1", "student/2", "sample")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a topology; `options` are those of npedit_jax.compile."""

    config: str
    topology: str
    data: int
    fsdp: int
    batch: int
    remat: str
    slices: int = 1
    programs: tuple[str, ...] = PROGRAMS

    @property
    def name(self) -> str:
        """Key in the results."""
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return (
            f"{self.config} {slices}{self.topology} data={self.data} fsdp={self.fsdp} batch={self.batch} {self.remat}"
        )

    def options(self) -> list[str]:
        """Of the command line."""
        trained = [f"--config.networks.{name}.options.remat={self.remat}" for name in ("student", "fake_score")]
        mesh = [f"--config.mesh.data={self.data}", f"--config.mesh.fsdp={self.fsdp}"]
        return [
            f"--config=configs/zimage/{self.config}.py",
            f"--topology={self.topology}",
            f"--slices={self.slices}",
            f"--config.batch_size={self.batch}",
            *mesh,
            *trained,
        ]


CASES = (
    Case("npedit", "v5p:4x4x4", 4, 16, 64, "dots_attention"),
    Case("npedit", "v6e:8x8", 4, 16, 64, "full"),
    Case("npedit", "v5e:16x16", 8, 32, 256, "full"),
    Case("npedit_lora", "v5e:4x4", 1, 16, 16, "full"),
    Case("npedit_lora", "v6e:4x4", 1, 16, 16, "full"),
    Case("npedit", "tpu7x:4x4x4", 8, 16, 128, "dots_attention"),
    # Weak scaling: with the row of v5p:4x4x4, one update on 16, 64 and 512 chips, a sample each.
    Case("npedit", "v5p:2x2x4", 1, 16, 16, "dots_attention", programs=("fake_score/2",)),
    Case("npedit", "v5p:8x8x8", 32, 16, 512, "dots_attention", programs=("fake_score/2",)),
    Case("npedit", "v6e:8x8", 8, 16, 128, "full", slices=2, programs=("fake_score/2",)),
)


def compile_program(case: Case, program: str) -> dict[str, Any]:
    """The report of one program, or `failures` alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "npedit_jax.compile", *case.options(), f"--only={program}", f"--json={file}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not file.exists():
            sys.exit(f"tpu_compile: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        print(done.stdout, flush=True)
        return json.loads(file.read_text())


def table(results: dict[str, Any]) -> str:
    """The tables of the page: a row a program, and a row a case whose programs are all there."""
    lines = [
        "| config, topology, mesh, remat | program | temporaries, peak GiB | of HBM | useful TFLOP | "
        "executed / useful | compute s | memory s | links s | largest gather MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, reports in results.items():
        for report in reports.values():
            lines += [_row(name, program, p, report) for program, p in report["programs"].items()]
            lines += [f"| {name} | does not fit | {failure} | | | | | | | |" for failure in report["failures"]]
    steps = [_step(name, reports) for name, reports in results.items()]
    if found := [line for line in steps if line]:
        lines += [
            "",
            "| config, topology, mesh, remat | step s, at least | bound MFU | executed / useful | chip-hours |",
        ]
        lines += ["|---|---|---|---|---|", *found]
    return "\n".join(lines)


def _row(name: str, program: str, p: dict[str, Any], report: dict[str, Any]) -> str:
    times = p["times"]
    links = times["interconnect"] + times["network"]
    return (
        f"| {name} | {program} | {p['temporaries'] / GIB:.1f}, {p['peak'] / GIB:.1f} | "
        f"{p['peak'] / report['memory']:.0%} | "
        f"{p['useful'] / 1e12:.0f} | {p['executed'] / p['useful']:.2f} | "
        f"{times['compute']:.2f} | {times['memory']:.2f} | {links:.2f} | "
        f"{p['largest_gather'][0] / 2**20:.0f} |"
    )


def _step(name: str, reports: dict[str, Any]) -> str:
    """Expectation over an outer step, from the programs that it runs."""
    programs = {key: p for report in reports.values() for key, p in report["programs"].items() if p["runs"]}
    if len(programs) < len(PROGRAMS) - 1:
        return ""
    any_report = next(iter(reports.values()))
    total = lambda value: sum(p["runs"] * value(p) for p in programs.values())  # noqa: E731
    seconds, useful = total(lambda p: max(p["times"].values())), total(lambda p: p["useful"])
    hours = seconds * any_report["steps"] * any_report["chips"] / 3600
    mfu = useful / seconds / any_report["peak_flops"]
    return f"| {name} | {seconds:.2f} | {mfu:.0%} | {total(lambda p: p['executed']) / useful:.2f} | {hours:.0f} |"


def write_page(results: dict[str, Any]) -> None:
    """Puts the tables between the page's marks."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="cases whose name holds this")
    parser.add_argument("--program", default="", help="programs whose name holds this")
    parser.add_argument("--again", action="store_true", help="compile what the results have already, too")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in CASES:
        for program in case.programs:
            if arguments.case not in case.name or arguments.program not in program:
                continue
            if arguments.again or program not in results.get(case.name, {}):
                results.setdefault(case.name, {})[program] = compile_program(case, program)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)
    if failures := [line for reports in results.values() for report in reports.values() for line in report["failures"]]:
        sys.exit("tpu_compile: " + "\n".join(failures))


if __name__ == "__main__":
    main()
