"""The ablations of the paper's section 4.3 in small, on easy-VQA: `python benchmarks/easyvqa_ablations.py`.

Every row is a run of `npedit_jax.train` with the same number of student updates at the same batch size, evaluated on
the test images. The figures of finished runs are gathered in benchmarks/easyvqa_ablations.json: those runs are skipped,
and a run that was stopped goes on where it was, so the script can be stopped at any time and started again. Two of it
side by side, each with rows of its own, get more out of two cores than one. Table and plot of docs/ablations.md are
made from the figures at the end; `--write` does that alone.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import runpy
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from npedit_jax import atomic

ROOT = pathlib.Path(__file__).parents[1]
EDITS = ("recolor", "remove", "replace", "nothing")
PAGE, PLOT = ROOT / "docs" / "ablations.md", ROOT / "docs" / "ablations.png"
FIGURES = ROOT / "benchmarks" / "easyvqa_ablations.json"
WEIGHTS = ROOT / "npedit_jax" / "pretrained" / "easyvqa"
Summary = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what differs from the full method."""

    title: str
    overrides: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    config: str = "npedit"
    scorer: str = ""  # one of SCORERS; "" is the shipped one


# Smaller and larger than the shipped scorer, trained by the same config.
SCORERS = {
    "small": (
        "networks.scorer.architecture.vision_config.hidden_size=64",
        "networks.scorer.architecture.vision_config.intermediate_size=192",
        "networks.scorer.architecture.vision_config.num_hidden_layers=2",
        "networks.scorer.architecture.llm_config.hidden_size=64",
        "networks.scorer.architecture.llm_config.intermediate_size=192",
        "networks.scorer.architecture.llm_config.num_hidden_layers=2",
    ),
    "tiny": (
        "networks.scorer.architecture.vision_config.hidden_size=32",
        "networks.scorer.architecture.vision_config.intermediate_size=96",
        "networks.scorer.architecture.vision_config.num_hidden_layers=1",
        "networks.scorer.architecture.vision_config.num_attention_heads=2",
        "networks.scorer.architecture.llm_config.hidden_size=32",
        "networks.scorer.architecture.llm_config.intermediate_size=96",
        "networks.scorer.architecture.llm_config.num_hidden_layers=1",
        "networks.scorer.architecture.llm_config.num_attention_heads=2",
        "networks.scorer.architecture.llm_config.num_key_value_heads=1",
    ),
}
ROWS = {
    "full": Row("full method", seeds=(0, 1, 2)),
    "no_scorer": Row("without the scorer's loss", ("step.scorer_weight=0.0",), seeds=(0, 1, 2)),
    "no_dmd": Row("without DMD", ("step.dmd_weight=0.0", "fake_updates=0"), seeds=(0, 1, 2)),
    "no_identity": Row("without the identity question", ("data.options.question_weights=(1.0,0.0)",)),
    "vocabulary": Row("cross-entropy over the whole vocabulary", ("step.scorer_form=vocabulary",)),
    "one_step": Row("one step unrolled instead of two", ("step.max_unroll=1",)),
    "scorer_small": Row("scorer: half as wide, two layers each", scorer="small"),
    "scorer_tiny": Row("scorer: a quarter as wide, one layer each", scorer="tiny"),
    "images_1": Row("1 % of the reference images", ("data.options.fraction=0.01",)),
    "images_10": Row("10 % of the reference images", ("data.options.fraction=0.1",)),
    "supervised": Row("taught with pairs (upper bound)", config="supervised"),
}


def run(*arguments: str) -> None:
    """Runs a module of the package from the repository's root; its output goes to the terminal."""
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True)


def override(*values: str) -> list[str]:
    """Config fields as options of `npedit_jax.train`."""
    return [f"--config.{value}" for value in values]


def train_scorer(size: str, output: pathlib.Path) -> pathlib.Path:
    """Trains a scorer of another size, if that is not done yet; returns the directory of its weights."""
    exported = output / f"scorer-{size}-weights"
    if not (exported / "scorer" / "config.json").exists():
        workdir = str(output / f"scorer-{size}")
        config = ("--config", "configs/easyvqa/scorer.py")
        run("npedit_jax.train", *config, "--workdir", workdir, *override(*SCORERS[size]))
        run("npedit_jax.export", "--checkpoint", workdir, "--output", str(exported))
    return exported / "scorer"


def train_and_score(name: str, seed: int, steps: int, output: pathlib.Path) -> Summary:
    """One row with one seed; its figures per edit type."""
    row, workdir = ROWS[name], output / f"{name}-{seed}"
    summary = workdir / "evaluation" / "summary.json"
    if not summary.exists():
        changes = [f"seed={seed}", f"steps={steps}", *row.overrides]
        if row.scorer:
            changes.append(f"networks.scorer.directory={train_scorer(row.scorer, output)}")
        print(f"== {row.title}, seed {seed}", flush=True)
        config = ("--config", f"configs/easyvqa/{row.config}.py")
        run("npedit_jax.train", *config, "--workdir", str(workdir), *override(*changes))
        scored = ("--benchmark", "easyvqa", "--output", str(workdir / "evaluation"))
        run("npedit_jax.evaluate", "--checkpoint", str(workdir), *scored)
    return json.loads(summary.read_text())["edits"]


class Figures:
    """The figures of the finished runs in a file: of one set of shipped weights, one config, one number of updates."""

    def __init__(self, path: pathlib.Path, made_with: Mapping[str, object]):
        """Raises: ValueError where the file's figures were made with something else."""
        self._path, self._made_with = path, dict(made_with)
        if (found := self._read()["made_with"]) != self._made_with:
            differs = f"{path} has figures of {found}, and asked for are those of {self._made_with}"
            raise ValueError(f"{differs}: move the file and the old runs away to begin again")

    def _read(self) -> dict[str, Any]:
        empty = {"made_with": self._made_with, "runs": {}}
        return json.loads(self._path.read_text()) if self._path.exists() else empty

    def has(self, name: str, seed: int) -> bool:
        """Whether this run is finished."""
        return str(seed) in self._read()["runs"].get(name, {})

    def add(self, name: str, seed: int, summary: Summary) -> None:
        """Notes a finished run; other rows may be made by another process meanwhile."""
        content = self._read()
        content["runs"].setdefault(name, {})[str(seed)] = summary
        atomic.write_text(self._path, json.dumps(content, indent=1) + "\n")

    def rows(self) -> dict[str, list[Summary]]:
        """Of the finished runs, by row, in the order of seeds."""
        runs = self._read()["runs"]
        return {name: [runs[name][seed] for seed in sorted(runs[name])] for name in ROWS if name in runs}


def in_rounds(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The runs of these rows, (name, seed), seed by seed: the table is whole after the first round."""
    for number in range(max(len(ROWS[name].seeds) for name in names)):
        for name in names:
            for seed in ROWS[name].seeds[number : number + 1]:
                yield name, seed


def digest(folder: pathlib.Path) -> str:
    """Tells the shipped weights of one version from those of another."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def config_digest() -> str:
    """Tells the configs of the full method and of the upper bound from later ones, apart from updates and seed."""
    found = hashlib.sha256()
    for name in ("npedit", "supervised"):
        config = runpy.run_path(str(ROOT / "configs" / "easyvqa" / f"{name}.py"))["get_config"]()
        fields = {key: value for key, value in json.loads(config.to_json()).items() if key not in ("steps", "seed")}
        found.update(json.dumps(fields, sort_keys=True).encode())
    return found.hexdigest()[:16]


def cell(values: Sequence[float], digits: int = 1) -> str:
    """The mean over seeds, with the range where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(results: Mapping[str, Sequence[Summary]]) -> str:
    """Markdown: a line per row, done with the rest kept (%) per edit type, and the kept error of all four together."""
    lines = [
        f"| | seeds | {' | '.join(f'{edit}, %' for edit in EDITS)} | kept error |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, summaries in results.items():
        done = [cell([summary[edit]["done_kept"] for summary in summaries]) for edit in EDITS]
        errors = [statistics.mean(summary[edit]["kept_error"] for edit in EDITS) for summary in summaries]
        lines.append(f"| {ROWS[name].title} | {len(summaries)} | {' | '.join(done)} | {cell(errors, 2)} |")
    return "\n".join(lines)


def plot(results: Mapping[str, Sequence[Summary]], path: pathlib.Path) -> None:
    """Bars: the share of the three edits done with the rest kept, a dot for every seed."""
    names = list(results)[::-1]
    figure = Figure(figsize=(7.5, 0.42 * len(names) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        values = [statistics.mean(summary[edit]["done_kept"] for edit in EDITS[:3]) for summary in results[name]]
        axes.barh(place, statistics.mean(values), color="#2f6db5" if name == "full" else "#9db8d6")
        axes.plot(values, [place] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(names)), [ROWS[name].title for name in names])
    axes.set(xlim=(0, 100), xlabel="recolor, remove, replace: done and the rest kept, mean %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def write(results: Mapping[str, Sequence[Summary]]) -> None:
    """Puts table and plot into docs/ablations.md, between its marks; what is written around them stays."""
    begin, end = "<!-- table: benchmarks/easyvqa_ablations.py --write -->", "<!-- end of the table -->"
    text = PAGE.read_text() if PAGE.exists() else f"# What each part is worth\n\n{begin}\n{end}\n"
    before, after = text.split(begin)[0], text.split(end)[1]
    plot(results, PLOT)
    PAGE.write_text(f"{before}{begin}\n{table(results)}\n\n![What each part is worth]({PLOT.name})\n{end}{after}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=ROOT / "runs" / "ablations", help="directory of all runs"
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, of: %(default)s")
    parser.add_argument(
        "--steps", type=int, help="student updates per run; by default those of the full method's config"
    )
    parser.add_argument("--write", action="store_true", help="only write docs/ablations.md from the finished runs")
    arguments = parser.parse_args()
    steps = arguments.steps or runpy.run_path(str(ROOT / "configs" / "easyvqa" / "npedit.py"))["get_config"]().steps
    names = arguments.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"unknown rows {unknown}; choose of {list(ROWS)}")
    try:
        figures = Figures(FIGURES, {"steps": steps, "weights": digest(WEIGHTS), "config": config_digest()})
    except ValueError as error:
        parser.error(str(error))
    if not arguments.write:
        for name, seed in in_rounds(names):
            if not figures.has(name, seed):
                figures.add(name, seed, train_and_score(name, seed, steps, arguments.output.absolute()))
    write(figures.rows())
    print(table(figures.rows()))


if __name__ == "__main__":
    main()
