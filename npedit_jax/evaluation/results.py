"""The directory of an evaluated editor: its edits, one line of figures for each, and how they were made.

    DIR/settings.json     what the edits depend on; an evaluation with others is refused
    DIR/<key>.png         the edits
    DIR/references/<key>.jpg   what they were made from, at the same size
    DIR/edits.jsonl       a line for each edit, as it is made: key, part, task, instruction, seed, figures, and as
                          "case" a digest of what it was made from
    DIR/answers.jsonl     VIEScore's answers, as they came
    DIR/summary.json      means of the figures, by part and task

An evaluation that was interrupted goes on where it stopped.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from npedit_jax import atomic, pictures
from npedit_jax.editor import Editor
from npedit_jax.evaluation import viescore
from npedit_jax.evaluation.cases import Case, digest, iterate
from npedit_jax.evaluation.preservation import kept, preservation
from npedit_jax.judge import Judge, Pair, successes

FIGURES = ("done", "kept", "ssim", "psnr", "consistency", "quality", "overall")
ALL, TASKS = "all edits", "mean of tasks"
Row = dict[str, Any]
Summary = dict[str, dict[str, dict[str, float]]]  # part -> task -> figure


class Results:
    """Opens or creates a directory of results.

    Args:
      settings: what the edits depend on, to add some; None opens the directory to read, and writes nothing.

    Raises:
      ValueError: it holds results of other settings, or files that are none.
    """

    def __init__(self, directory: epath.PathLike, settings: Mapping[str, Any] | None = None):
        self.directory = epath.Path(directory)
        file = self.directory / "settings.json"
        if file.exists():
            self.settings = _read_settings(file)
            different = [name for name, value in (settings or {}).items() if self.settings.get(name) != value]
            if different:
                found = "; ".join(f"{name} is {self.settings.get(name)!r} there" for name in different)
                raise ValueError(
                    f"{directory} holds results of other settings: {found}. Take another --name or --output"
                )
        elif settings is None:
            raise ValueError(f"{directory} holds no results (no settings.json)")
        else:
            left = atomic.partial_name(file.name)  # by one killed before it began
            if self.directory.exists() and any(path.name != left for path in self.directory.iterdir()):
                raise ValueError(f"{directory} is not empty and holds no results; take another --name or --output")
            self.settings = dict(settings)
            self.directory.mkdir(parents=True, exist_ok=True)
            atomic.write_text(file, json.dumps(self.settings, indent=2) + "\n")
        rows = self._read_rows()
        self._rows = {row["key"]: row for row in rows if self.picture(row["key"]).exists()}
        if settings is not None:  # more lines are to come, and a crash may have cut the last one short
            atomic.write_text(
                self.directory / "edits.jsonl", "".join(json.dumps(row) + "\n" for row in self._rows.values())
            )

    @property
    def name(self) -> str:
        """What the editor is called."""
        return self.directory.name

    def picture(self, key: str) -> epath.Path:
        """The file of an edit."""
        return self.directory / f"{key}.png"

    def reference(self, key: str) -> epath.Path:
        """The file of what an edit was made from."""
        return self.directory / "references" / f"{key}.jpg"

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def check(self, key: str, digest: str) -> None:
        """Raises ValueError where an edit that is there was made from something else than what has this digest."""
        if self._rows[key].get("case") != digest:
            raise ValueError(
                f"{self.directory} holds an edit {key} of another picture, instruction, object or mask; take another "
                "--name or --output"
            )

    def add(self, row: Row, edited: Image.Image, reference: Image.Image) -> None:
        """Writes one edit; its line comes last, so that what has one is whole."""
        key = row["key"]
        for file in (self.picture(key), self.reference(key)):
            file.parent.mkdir(parents=True, exist_ok=True)
        with self.reference(key).open("wb") as file:
            reference.save(file, format="JPEG", quality=90)
        pictures.write_png(edited, self.picture(key), {name: row[name] for name in ("instruction", "seed")})
        with (self.directory / "edits.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._rows[key] = row

    def rows(self, keys: Iterable[str] | None = None) -> list[Row]:
        """The figures of each edit, VIEScore's among them where it has answered."""
        answers = viescore.read_answers(self.directory / "answers.jsonl")
        chosen = self._rows if keys is None else keys
        return [self._rows[key] | viescore.scores(answers, key) for key in chosen if key in self._rows]

    def _read_rows(self) -> list[Row]:
        file = self.directory / "edits.jsonl"
        rows = []
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # cut short by a crash
                continue
            if not isinstance(row, dict) or not {"key", "part", "task", "instruction"} <= row.keys():
                raise ValueError(f"{file} holds a line that is no edit: {line[:80]}")
            rows.append(row)
        return rows


def _read_settings(file: epath.Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings but a {type(settings).__name__}")
    return settings


def make(
    results: Results,
    editor: Editor,
    judge: Judge | None,
    cases: Sequence[Case],
    *,
    seed: int,
    batch: int,
    original_size: bool,
    advance: Callable[[int], Any] = lambda count: None,
) -> None:
    """Makes, judges and writes the edits that are not there yet, in batches of one size.

    Args:
      seed: of all; each case's own follows from it and from its key, whatever else is edited.
      advance: called with the number of edits after each batch.

    Raises:
      ValueError: a case whose picture does not read, whose mask is all bright, or whose instruction the editor or the
        judge does not take; it is named.
    """
    for case, image in iterate([case for case in cases if case.key in results]):
        results.check(case.key, digest(case, image))
    todo = [case for case in cases if case.key not in results]
    for case in todo:
        try:
            editor.check(case.instruction)
            if judge is not None:
                judge.check([_asked(judge, case)])
        except ValueError as error:
            raise ValueError(f"case {case.key}: {error}") from error
    waiting: dict[tuple[int, ...], list[_Ready]] = {}
    compiled = set()  # the shapes whose program for a whole batch there is
    for case, image in iterate(todo):
        pixels = editor.fit(image)
        if case.mask:
            _check_mask(case, size=pixels.shape[1::-1])
        group = waiting.setdefault(pixels.shape, [])
        group.append(_Ready(case, digest(case, image), image.size, pixels))
        if len(group) == batch:
            _make_batch(results, editor, judge, waiting.pop(pixels.shape), seed, batch, original_size)
            compiled.add(pixels.shape)
            advance(batch)
    for shape, group in waiting.items():
        # A few pictures of a rare shape are not filled up to a whole batch; a power of two bounds the programs.
        size = batch if shape in compiled else min(batch, 1 << (len(group) - 1).bit_length())
        _make_batch(results, editor, judge, group, seed, size, original_size)
        advance(len(group))


class _Ready(NamedTuple):
    """A case whose picture has been read: its digest, its size (width, height), and its pixels for the networks."""

    case: Case
    digest: str
    size: pictures.Size
    pixels: np.ndarray


def _make_batch(
    results: Results,
    editor: Editor,
    judge: Judge | None,
    group: Sequence[_Ready],
    seed: int,
    batch: int,
    original_size: bool,
) -> None:
    cases, references = [ready.case for ready in group], np.stack([ready.pixels for ready in group])
    seeds = [zlib.crc32(f"{seed}/{case.key}".encode()) for case in cases]
    edited = editor.edit_batch(references, [case.instruction for case in cases], seeds, batch_size=batch)
    scores = [{}] * len(cases)
    if judge is not None:
        asked = [_asked(judge, case) for case in cases]
        found = successes(judge(references, edited, asked, batch=batch), asked).tolist()
        scores = [{"done": done, "kept": kept} for done, kept in found]
    for number, (case, origin, size, _) in enumerate(group):
        reference, edit = Image.fromarray(references[number]), Image.fromarray(edited[number])
        row = {name: getattr(case, name) for name in ("key", "part", "task", "instruction")}
        row |= {"seed": seeds[number], "case": origin}
        row |= scores[number] | preservation(reference, edit, case.mask() if case.mask else None)
        results.add(row, pictures.resize(edit, size) if original_size else edit, reference)


def _check_mask(case: Case, size: pictures.Size) -> None:
    """Raises ValueError where a case's mask cannot be used; before its batch is edited, which would be lost."""
    try:
        kept(case.mask(), size)
    except ValueError as error:
        raise ValueError(f"case {case.key}: {error}") from error


def _asked(judge: Judge, case: Case) -> Pair:
    return judge.questions(case.instruction, case.edit_type if case.object else "", case.object)


def grade(results: Results, grader: viescore.Grader, keys: Sequence[str], advance: Callable[[int], Any]) -> None:
    """Has VIEScore's questions answered about the edits of these keys."""

    def opened(*files: epath.Path) -> list[Image.Image]:
        return [pictures.read(file) for file in files]

    questions = []
    for row in results.rows(keys):
        both = (results.reference(row["key"]), results.picture(row["key"]))
        for kind, files in zip(viescore.KINDS, (both, both[1:]), strict=True):
            questions.append(
                viescore.Question(row["key"], kind, row["instruction"], lambda files=files: opened(*files))
            )
    grader.ask(questions, advance)


def summarise(rows: Sequence[Row]) -> Summary:
    """Means of the figures that there are, and their counts, by part and task, over all edits, and over the tasks."""
    summary: Summary = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        tasks = {
            task: _means([row for row in mine if row["task"] == task]) for task in sorted({r["task"] for r in mine})
        }
        over_tasks = _means(list(tasks.values())) | {"count": len(tasks)}
        summary[part] = tasks | {ALL: _means(mine), TASKS: over_tasks}
    return summary


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found = {name: [row[name] for row in rows if name in row] for name in FIGURES}
    means = {name: float(np.mean(values)) for name, values in found.items() if values}
    return {"count": len(rows)} | means | {"graded": len(found["overall"])}


def table(summary: Summary) -> str:
    """The summary as plain text; a dash where there is no figure."""
    lines = []
    for part, tasks in summary.items():
        lines.append(f"{part or 'task':<28}{'count':>7}" + "".join(f"{name:>13}" for name in FIGURES))
        for task, figures in tasks.items():
            cells = (f"{figures[name]:>13.3f}" if name in figures else f"{'-':>13}" for name in FIGURES)
            lines.append(f"{task:<28}{figures['count']:>7}" + "".join(cells))
        missing = tasks[ALL]["count"] - tasks[ALL]["graded"]
        if 0 < missing < tasks[ALL]["count"]:
            lines.append(f"{missing} edits have no grade: the model's answers to them hold none")
    return "\n".join(lines)
