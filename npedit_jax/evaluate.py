"""Scores a trained editor: `python -m npedit_jax.evaluate --checkpoint RUN --benchmark easyvqa --output DIR`.

Writes DIR/scores.json (every edit) and DIR/summary.json, and prints the summary as a table.
"""

import argparse
import json
import sys

import jax
import ml_collections
import numpy as np
import tqdm
from etils import epath

from npedit_jax.data import easyvqa as dataset
from npedit_jax.data import questions
from npedit_jax.data.tokenize import ScorerTokenizer
from npedit_jax.editor import Editor
from npedit_jax.evaluation import easyvqa, report
from npedit_jax.training import networks, telemetry, workdirs

BENCHMARKS = ("easyvqa",)


def scorer_answers(
    config: ml_collections.ConfigDict,
    references: np.ndarray,
    edited: np.ndarray,
    edits: list[dataset.Edit],
    *,
    batch: int,
    advance: easyvqa.Advance,
) -> np.ndarray:
    """P(yes) [n, 2] by the scorer that the run learned from, asked as in the run."""
    module, params = networks.create(config.networks.scorer, jax.random.key(config.seed))
    tokenizer = ScorerTokenizer(
        networks.resolve(config.data.scorer_tokenizer), module.image_tokens, config.data.question_length
    )
    templates = questions.TEMPLATES[config.data.templates]
    return easyvqa.scorer_probabilities(module, params, tokenizer, templates, references, edited, edits, batch, advance)


def evaluate_easyvqa(arguments: argparse.Namespace) -> None:
    """Edits the test images, judges the edits, and writes what came out once all of it is there.

    Raises:
      workdirs.WorkdirError: the checkpoint directory is no run of an editor.
    """
    run, seed, batch = arguments.checkpoint, arguments.seed, arguments.batch
    config = workdirs.read_config(run)
    editor = Editor.from_checkpoint(run, raw=arguments.raw)
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
    if "scorer" in config.networks and config.networks.scorer.directory:
        references, edits = data.images[[request.index for request in asked]], [request.edit for request in asked]
        with progress(len(asked), "ask the scorer") as bar:
            answers = scorer_answers(config, references, edited, edits, batch=batch, advance=bar.update)
        for item, (edit, identity) in zip(scores, answers.tolist(), strict=True):
            item |= {"scorer_edit": edit, "scorer_identity": identity}

    summary = easyvqa.summarise(scores)
    facts = {"benchmark": "easyvqa", "seed": seed, "raw": arguments.raw, "images": len(data), "edits": summary}
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (output / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    if page:
        metrics = telemetry.read_metrics(run) if (epath.Path(run) / "metrics.jsonl").exists() else []
        title = "Edits of easy-VQA's test images"
        page.write_text(report.render(data, asked, edited, scores, metrics, title=title))
    print(easyvqa.table(summary))


def progress(total: int, label: str) -> tqdm.tqdm:
    """A progress bar over edits with the time left, sparse when not on a terminal."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm.tqdm(total=total, desc=label, unit="edit", mininterval=interval, dynamic_ncols=True)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and one line where it cannot evaluate."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="working directory of a training run")
    parser.add_argument("--benchmark", required=True, help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", required=True, help="directory for scores.json and summary.json")
    parser.add_argument("--report", help="also write this HTML page with pictures and curves")
    parser.add_argument("--limit", type=positive, help="only the first that many test images")
    parser.add_argument("--raw", action="store_true", help="the parameters as trained instead of their average")
    parser.add_argument("--seed", type=int, default=0, help="draws the edits and the editor's noise")
    parser.add_argument("--batch", type=positive, default=64, help="edits at a time")
    arguments = parser.parse_args(argv)
    if arguments.benchmark not in BENCHMARKS:
        sys.exit(f"evaluate: unknown benchmark {arguments.benchmark!r}; choose one of: {', '.join(BENCHMARKS)}")
    try:
        evaluate_easyvqa(arguments)
    except (workdirs.WorkdirError, OSError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
