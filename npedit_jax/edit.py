"""Edits pictures: `python -m npedit_jax.edit --checkpoint RUN --image F --instruction S --output G`.

Several instructions and seeds at once, on one sheet: `--instruction A --instruction B --seeds 0 1 2 --sheet G`. Many
pictures, in batches: `--batch FILE.jsonl` with lines {"image": F, "instruction": S, "output": G}, and "seed": N where
it is to differ from --seed. With `--best-of N` the edit that the run's scorer likes best of N seeds is kept.

Everything is checked before the first picture is made. Pictures may be of any size. Outputs are PNG, with the
instruction, the seed, the checkpoint and the scorer's probabilities in their metadata.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import logging
from etils import epath
from PIL import Image

from npedit_jax import commands, contact_sheet, jsonl, pictures
from npedit_jax.editor import FITS, TASKS, Editor
from npedit_jax.judge import Judge, successes

BATCH_SIZE = 16  # pictures of one size that go through the networks at a time
FIELDS = {"image": str, "instruction": str, "output": str, "seed": int}


@dataclasses.dataclass(frozen=True)
class Request:
    """One edit to make; `origin` says where it was asked for, as a start of messages."""

    image: str
    instruction: str
    output: str
    seed: int
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Edit:
    """An edit as made; `scores` are the scorer's probabilities that it was done and that the rest was kept."""

    picture: Image.Image
    seed: int
    step: int | None
    scores: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """How edits are made.

    Attributes:
      raw: take the parameters as trained instead of their average.
      fit: how pictures are fitted, see `Editor`.
      task: which of a run's tasks is meant, see `Editor`.
      original_size: bring edits back to the size of their picture.
      score: ask the run's scorer about each edit.
      best_of: seeds tried for each request, from its own upwards; above 1 the scorer chooses.
    """

    raw: bool = False
    fit: str = FITS[0]
    task: str = TASKS[0]
    original_size: bool = False
    score: bool = False
    best_of: int = 1


DEFAULTS = Options()


def read_batch(file: epath.PathLike, seed: int) -> list[Request]:
    """The requests of a JSONL file, `seed` where a line has none; blank lines are passed over.

    Raises:
      ValueError: there is no such file, no request in it, or a line, which is numbered, is not a request.
    """
    file = epath.Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not there, or is no file; give --batch a JSONL file")
    requests = []
    for line in jsonl.read(file):
        with _saying(line.origin):
            _check_fields(line.fields)
        requests.append(Request(**({"seed": seed} | line.fields), origin=line.origin))
    if not requests:
        raise ValueError(f"{file} holds no requests; give one JSON object per line")
    return requests


def _check_fields(fields: Mapping[str, Any]) -> None:
    if missing := [name for name in FIELDS if name not in fields and name != "seed"]:
        raise ValueError(f"{', '.join(missing)} missing; a line needs image, instruction and output")
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise ValueError(f"unknown fields {', '.join(unknown)}; known are {', '.join(FIELDS)}")
    for name, value in fields.items():
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            raise ValueError(f"{name} must be of type {FIELDS[name].__name__}, found {value!r}")


def check_output(output: str) -> None:
    """Raises ValueError where the output has no folder to go to or another suffix than .png."""
    path = epath.Path(output)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output {output} must end in .png: that is the format written")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of output {output} is missing; create {path.parent} first")
    if path.is_dir():
        raise ValueError(f"output {output} is a folder; give a file")


def edit(checkpoint: str, requests: list[Request], options: Options = DEFAULTS) -> None:
    """Checks all requests, then makes and writes the edits, batched by size.

    Raises:
      ValueError: a request or the checkpoint directory is wrong; nothing has been written then.
    """
    outputs: dict[str, Request] = {}
    readers = collections.defaultdict(list)
    for request in requests:
        with _saying(request.origin):
            readers[_place(request.image)].append(request)
    for request in requests:
        with _saying(request.origin):
            check_output(request.output)
            place = _place(request.output)
            if outputs.setdefault(place, request) is not request:
                raise ValueError(f"output {request.output} is asked for twice")
            if any(other is not request for other in readers[place]):  # the edit could be there before it is read
                raise ValueError(f"output {request.output} is also an image to edit; give it another name")
    with tqdm.tqdm(total=len(requests), desc="edit", unit="edit", disable=None if len(requests) > 1 else True) as bar:
        for number, made in make(checkpoint, requests, options):
            notes = {"instruction": requests[number].instruction, "seed": made.seed}
            notes |= {"checkpoint": checkpoint, "step": made.step}
            if made.scores:
                notes |= {"P(done)": f"{made.scores[0]:.4f}", "P(rest kept)": f"{made.scores[1]:.4f}"}
            pictures.write_png(made.picture, requests[number].output, notes)
            bar.update()


def _place(file: str) -> str:
    """A file's own name, whatever leads to it."""
    return str(epath.Path(file).resolve())


def sheet(
    checkpoint: str, image: str, instructions: Sequence[str], seeds: Sequence[int], output: str, options: Options
) -> None:
    """Writes one picture with an edit for each instruction (a row) and seed (a column); raises as `edit`."""
    check_output(output)
    if _place(image) == _place(output):
        raise ValueError(f"sheet {output} is also the image to edit; give it another name")
    requests = [Request(image, instruction, output, seed) for instruction in instructions for seed in seeds]
    made = dict(make(checkpoint, requests, options))
    rows, reference = [], pictures.read(image)
    for row, instruction in enumerate(instructions):
        edits = [made[row * len(seeds) + column] for column in range(len(seeds))]
        cells = [contact_sheet.Cell(pictures.resize(reference, edits[0].picture.size), ("reference",))]
        cells += [contact_sheet.Cell(each.picture, _lines(each)) for each in edits]
        rows.append((instruction, cells))
    notes = {"instruction": "\n".join(instructions), "seed": " ".join(map(str, seeds)), "checkpoint": checkpoint}
    pictures.write_png(contact_sheet.draw(rows), output, notes)


def _lines(made: Edit) -> tuple[str, ...]:
    return f"seed {made.seed}", *contact_sheet.scores(*made.scores or (None, None))


def make(checkpoint: str, requests: Sequence[Request], options: Options) -> Iterator[tuple[int, Edit]]:
    """Checks all requests and then makes the edits, by size: (number of the request, edit), in whatever order.

    Raises:
      ValueError: a request or the checkpoint directory is wrong.
    """
    # Only sizes are kept, and pictures read again when it is their turn: a thousand photographs fill the memory.
    read = functools.lru_cache(maxsize=1)(pictures.read)
    sizes: dict[str, pictures.Size] = {}
    for request in requests:
        with _saying(request.origin):
            sizes[request.image] = sizes.get(request.image) or read(request.image).size
    # After the files: loading a large network takes a while, and a mistyped name should be told at once.
    editor = Editor.from_checkpoint(checkpoint, raw=options.raw, fit=options.fit, task=options.task)
    for request in requests:
        with _saying(request.origin):
            for seed in (request.seed, request.seed + options.best_of - 1):
                editor.check(request.instruction, seed)
    judge = Judge.of_run(checkpoint, task=options.task) if options.score or options.best_of > 1 else None
    for request in requests if judge else ():
        with _saying(request.origin):
            judge.check([judge.questions(request.instruction)])

    by_size = collections.defaultdict(list)
    for number, request in enumerate(requests):
        by_size[editor.size(*sizes[request.image])].append(number)
    for numbers in by_size.values():
        size = min(BATCH_SIZE, len(numbers) * options.best_of)
        step = max(1, size // options.best_of)
        for start in range(0, len(numbers), step):
            chosen = numbers[start : start + step]
            references = np.stack([editor.fit(read(requests[number].image)) for number in chosen])
            made = _make_batch(editor, judge, [requests[number] for number in chosen], references, size, options)
            for number, one in zip(chosen, made, strict=True):
                if options.original_size:
                    picture = pictures.resize(one.picture, sizes[requests[number].image])
                    one = dataclasses.replace(one, picture=picture)
                yield number, one


def _make_batch(
    editor: Editor,
    judge: Judge | None,
    requests: Sequence[Request],
    references: np.ndarray,
    size: int,
    options: Options,
) -> list[Edit]:
    """The edits of pictures of one size; of several seeds for each the one with the best scores."""
    tries = options.best_of
    repeated = np.repeat(references, tries, axis=0)
    instructions = [request.instruction for request in requests for _ in range(tries)]
    seeds = [request.seed + offset for request in requests for offset in range(tries)]
    edited = editor.edit_batch(repeated, instructions, seeds, batch_size=size)
    if judge is None:
        return [Edit(Image.fromarray(pixels), seed, editor.step) for pixels, seed in zip(edited, seeds, strict=True)]
    asked = [judge.questions(instruction) for instruction in instructions]
    scores = successes(judge(repeated, edited, asked, batch=size), asked)
    known = np.nan_to_num(scores.prod(axis=1), nan=-1.0)  # a try that the scorer cannot judge is the best of none
    best = known.reshape(-1, tries).argmax(axis=1) + tries * np.arange(len(requests))
    return [Edit(Image.fromarray(edited[row]), seeds[row], editor.step, tuple(scores[row].tolist())) for row in best]


@contextlib.contextmanager
def _saying(origin: str) -> Iterator[None]:
    """Puts where a request came from before what was wrong with it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{origin}{error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.edit", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="working directory of a training run")
    parser.add_argument("--image", help="picture to edit, of any size and usual format")
    parser.add_argument(
        "--instruction", action="append", help="what to do, such as 'make the circle red'; again for a sheet's next row"
    )
    parser.add_argument("--output", help="PNG file to write")
    parser.add_argument("--sheet", metavar="FILE.png", help="write all instructions and --seeds as one picture")
    parser.add_argument("--batch", metavar="FILE.jsonl", help="edit many: one JSON object per line")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; other seeds give other pictures")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="the columns of --sheet")
    parser.add_argument("--best-of", type=positive, default=1, metavar="N", help="keep the best of N seeds")
    parser.add_argument("--scores", action="store_true", help="ask the run's scorer about each edit")
    parser.add_argument("--fit", choices=FITS, default=FITS[0], help="how a picture's size is chosen")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="where a run has learned several")
    parser.add_argument("--original-size", action="store_true", help="bring edits back to their picture's size")
    parser.add_argument("--raw", action="store_true", help="the parameters as trained instead of their average")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, for a command line."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _check_arguments(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Ends the program where the arguments do not go together."""
    targets = [name for name in ("output", "sheet", "batch") if getattr(given, name) is not None]
    if len(targets) != 1:
        parser.error("give one of --output, --sheet and --batch")
    if given.batch is not None and (given.image is not None or given.instruction is not None):
        parser.error("--batch goes without --image and --instruction; its lines give them")
    if given.batch is None and (given.image is None or given.instruction is None):
        parser.error("give --image and --instruction, or --batch")
    if given.output is not None and len(given.instruction) > 1:
        parser.error("--output takes one instruction; several go on a --sheet")
    if given.seeds is not None and given.sheet is None:
        parser.error("--seeds goes with --sheet; elsewhere --seed gives the one seed")


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and one line where it cannot edit."""
    parser = _parser()
    given = parser.parse_args(argv)
    _check_arguments(parser, given)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a checkpoint opened to be read is read-only
    options = Options(given.raw, given.fit, given.task, given.original_size, given.scores, given.best_of)
    with commands.told("edit"):
        if given.sheet is not None:
            seeds = given.seeds or [given.seed]
            sheet(given.checkpoint, given.image, given.instruction, seeds, given.sheet, options)
        elif given.batch is not None:
            edit(given.checkpoint, read_batch(given.batch, given.seed), options)
        else:
            edit(given.checkpoint, [Request(given.image, given.instruction[0], given.output, given.seed)], options)


if __name__ == "__main__":
    main()
