"""Scores a trained editor: `python -m npedit_jax.evaluate --checkpoint RUN --benchmark NAME --output DIR`.

easyvqa: the test images of easy-VQA, judged from their pixels; writes scores.json, summary.json and edits.png to DIR.
gedit, dreambooth, folder: photographs, from a local copy of the benchmark's files given by --data; edits, figures and
index.html go to DIR/NAME, with NAME that of the run unless --name gives another. Started again it goes on. With
--vie-url a vision-language model grades the edits as well. `--compare DIR/A DIR/B --output page.html` puts the results
of two editors side by side.
"""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

import tqdm
from absl import logging
from etils import epath

from npedit_jax import commands, pictures
from npedit_jax.data import easyvqa as dataset
from npedit_jax.edit import positive
from npedit_jax.editor import FITS, TASKS, Editor
from npedit_jax.evaluation import easyvqa, report
from npedit_jax.judge import Judge, has_scorer
from npedit_jax.training import telemetry, workdirs

if TYPE_CHECKING:
    from npedit_jax.evaluation.results import Results

PHOTOGRAPHS = ("gedit", "dreambooth", "folder")
BENCHMARKS = ("easyvqa", *PHOTOGRAPHS)


def evaluate_easyvqa(arguments: argparse.Namespace) -> None:
    """Edits the test images, judges the edits, and writes what came out once all of it is there.

    Raises:
      workdirs.WorkdirError: the checkpoint directory is no run of an editor.
    """
    run, seed, batch = arguments.checkpoint, arguments.seed, arguments.batch
    editor = Editor.from_checkpoint(run, raw=arguments.raw)
    with workdirs.reading(run) as config:
        scored = has_scorer(config)
    output, page = epath.Path(arguments.output), epath.Path(arguments.report) if arguments.report else None
    for directory in [output] + ([page.parent] if page else []):
        directory.mkdir(parents=True, exist_ok=True)  # now, not after minutes of work for nothing
    data = dataset.load("test")
    if arguments.limit is not None:
        data = data.fraction(min(1.0, arguments.limit / len(data)))
    asked = easyvqa.requests(data, seed)
    with progress(len(asked), "edit") as bar:
        edited = easyvqa.edit_all(editor.edit_batch, data, asked, seed=seed, batch=batch, advance=bar.update)
    scores = easyvqa.score(data, asked, edited)
    if scored:
        judge, references = Judge.of_run(run), data.images[[request.index for request in asked]]
        edits = [request.edit for request in asked]
        pairs = [judge.questions(edit.instruction, edit.edit_type, edit.object) for edit in edits]
        with progress(len(asked), "ask the scorer") as bar:
            answers = judge(references, edited, pairs, batch=batch, advance=bar.update)
        for item, (edit, identity) in zip(scores, answers.tolist(), strict=True):
            item |= {"scorer_edit": edit, "scorer_identity": identity}

    summary = easyvqa.summarise(scores)
    facts = {"benchmark": "easyvqa", "seed": seed, "raw": arguments.raw, "images": len(data), "edits": summary}
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (output / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    pictures.write_png(
        report.sheet(data, asked, edited, scores), output / "edits.png", {"checkpoint": run, "seed": seed}
    )
    if page:
        metrics = telemetry.read_metrics(run) if (epath.Path(run) / "metrics.jsonl").exists() else []
        title = "Edits of easy-VQA's test images"
        page.write_text(report.render(data, asked, edited, scores, metrics, title=title))
    print(easyvqa.table(summary))


def evaluate_photographs(given: argparse.Namespace) -> None:
    """Edits the cases of a benchmark, scores them, and writes tables and a page.

    Raises:
      workdirs.WorkdirError: the checkpoint directory is no run of an editor.
      ValueError: the benchmark's files or the results that are there do not fit.
    """
    from npedit_jax.evaluation import cases as cases_lib
    from npedit_jax.evaluation import comparison, results

    if given.data is None:
        raise ValueError(f"--benchmark {given.benchmark} needs --data, a local copy of its files")
    read = {"gedit": cases_lib.gedit, "dreambooth": cases_lib.dreambooth, "folder": cases_lib.folder}[given.benchmark]
    cases = read(given.data, given.languages) if given.benchmark == "gedit" else read(given.data)
    if not cases:
        raise ValueError(f"{given.data} holds nothing to edit")
    cases = cases[: given.limit]
    decisive = ("benchmark", "data", "checkpoint", "raw", "seed", "fit", "original_size")
    settings = {name: getattr(given, name) for name in decisive}
    task = "customization" if given.benchmark == "dreambooth" else "editing"
    editor = Editor.from_checkpoint(given.checkpoint, raw=given.raw, fit=given.fit, task=task)
    name = given.name or epath.Path(given.checkpoint).resolve().name
    made = results.Results(epath.Path(given.output) / name, settings | {"step": editor.step})
    with workdirs.reading(given.checkpoint) as config:
        templates = task if config.data.get("templates") in TASKS else ""  # the small experiment has its own
        judge = Judge.of_run(given.checkpoint, templates=templates) if has_scorer(config) else None
    with progress(sum(case.key not in made for case in cases), "edit") as bar:
        options = dict(seed=given.seed, batch=given.batch, original_size=given.original_size)
        results.make(made, editor, judge, cases, advance=bar.update, **options)
    keys = [case.key for case in cases]
    if given.vie_url:
        grade(given, made, keys)
    summary = results.summarise(made.rows(keys))
    (made.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    comparison.write(made.directory / "index.html", [made], f"{made.name}: {given.benchmark}", keys)
    print(results.table(summary))


def grade(given: argparse.Namespace, made: "Results", keys: list[str]) -> None:
    """Has the model behind --vie-url grade the edits; raises ValueError where it cannot be asked."""
    import openai

    from npedit_jax.evaluation import results, viescore

    task = "customization" if given.benchmark == "dreambooth" else "editing"
    key = os.environ.get("OPENAI_API_KEY", "none")
    grader = viescore.Grader(given.vie_url, given.vie_model, task, made.directory / "answers.jsonl", key=key)
    with progress(len(viescore.KINDS) * len(keys), "grade") as bar:
        bar.update(len(grader.answers()))
        try:
            results.grade(made, grader, keys, bar.update)
        except openai.OpenAIError as error:
            raise ValueError(f"{given.vie_url}: {error}; the answers so far are kept, start again to go on") from error


def compare(given: argparse.Namespace) -> None:
    """Puts the results of several editors on one page, and prints their tables; raises ValueError as `Results`."""
    from npedit_jax.evaluation import comparison, results

    runs = [results.Results(directory) for directory in given.compare]
    left_out = comparison.write(given.output, runs, " and ".join(run.name for run in runs))
    for run, count in zip(runs, left_out.values(), strict=True):
        others = f", {count} of these edits are of cases that the others do not have" if count else ""
        print(f"{run.directory}{others}\n{results.table(results.summarise(run.rows()))}")


def progress(total: int, label: str) -> tqdm.tqdm:
    """A progress bar over edits with the time left, sparse when not on a terminal."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm.tqdm(total=total, desc=label, unit="edit", mininterval=interval, dynamic_ncols=True)


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and one line where it cannot evaluate."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="working directory of a training run")
    parser.add_argument("--benchmark", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", required=True, help="directory for the results; the page with --compare")
    parser.add_argument("--data", help="local copy of the benchmark's files; easyvqa needs none")
    parser.add_argument("--name", help="of the editor, as a folder below --output; by default that of the run")
    parser.add_argument("--languages", nargs="+", default=["en", "cn"], help="gedit: of the instructions")
    parser.add_argument("--compare", nargs="+", metavar="DIR", help="instead: results to put side by side")
    parser.add_argument("--report", help="easyvqa: also write this HTML page with pictures and curves")
    parser.add_argument("--limit", type=positive, help="only the first that many cases or test images")
    parser.add_argument("--fit", choices=FITS, default=FITS[0], help="how a photograph's size is chosen")
    parser.add_argument("--original-size", action="store_true", help="write edits at their photograph's size")
    parser.add_argument("--vie-url", help="grade with the model behind this OpenAI-compatible address (VIEScore)")
    parser.add_argument("--vie-model", default="default", help="its name there; OPENAI_API_KEY is its key")
    parser.add_argument("--raw", action="store_true", help="the parameters as trained instead of their average")
    parser.add_argument("--seed", type=int, default=0, help="draws the edits and the editor's noise")
    parser.add_argument("--batch", type=positive, default=64, help="edits at a time")
    arguments = parser.parse_args(argv)
    if not arguments.compare and None in (arguments.checkpoint, arguments.benchmark):
        parser.error("give --checkpoint and --benchmark, or --compare")
    if not arguments.compare and arguments.benchmark not in BENCHMARKS:
        sys.exit(f"evaluate: unknown benchmark {arguments.benchmark!r}; choose one of: {', '.join(BENCHMARKS)}")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a checkpoint opened to be read is read-only
    with commands.told("evaluate", extra="evaluate"):
        if arguments.compare:
            compare(arguments)
        elif arguments.benchmark == "easyvqa":
            evaluate_easyvqa(arguments)
        else:
            evaluate_photographs(arguments)


if __name__ == "__main__":
    main()
