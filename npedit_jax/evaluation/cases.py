"""What a benchmark asks for: cases with a picture and an instruction, read from a local copy of the benchmark's files.

Pictures are read when they are needed, so that a benchmark of any size takes the memory of a batch.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from PIL import Image

from npedit_jax import jsonl, pictures

LANGUAGES = ("en", "cn")
CASE_FIELDS = {"image": str, "instruction": str, "task": str, "key": str, "object": str, "edit_type": str, "mask": str}
SAFE = re.compile(r"[\w.\-]+")  # a name that is one component of a path


@dataclasses.dataclass(frozen=True)
class Case:
    """One edit that a benchmark asks for.

    Attributes:
      key: where its picture goes, a path without suffix below the results of an editor.
      task: what it counts under in the tables.
      instruction: what the editor is told.
      read: the reference picture.
      part: of the benchmark, with tables of its own: a language of GEdit-Bench.
      edit_type, object: for the scorer's question; "remove" with an object asks whether that is there.
      mask: where given, a picture that is bright where the edit is: what lies outside should stay.
    """

    key: str
    task: str
    instruction: str
    read: Callable[[], Image.Image]
    part: str = ""
    edit_type: str = ""
    object: str = ""
    mask: Callable[[], Image.Image] | None = None


def folder(directory: epath.PathLike) -> list[Case]:
    """Cases of any pictures: `instructions.jsonl` in the directory, with one JSON object per line.

    A line has "image" (a path below the directory) and "instruction", and may have "task" to group by, "key" to name
    the result, "edit_type" and "object" (see Case), and "mask" (a path).

    Raises:
      ValueError: no such file, or a line that is no case; it is numbered.
    """
    directory = epath.Path(directory)
    file = directory / "instructions.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} is not there; write one JSON object per line: image, instruction")
    cases, numbers = [], {}
    for line in jsonl.read(file):
        try:
            case = _folder_case(directory, line.fields, line.number)
            if numbers.setdefault(case.key, line.number) != line.number:
                raise ValueError(f"key {case.key!r} is line {numbers[case.key]}'s already")
        except (ValueError, OSError) as error:  # a name that is too long is an OSError
            raise ValueError(f"{line.origin}{error}") from error
        cases.append(case)
    return cases


def _folder_case(directory: epath.Path, fields: Mapping[str, Any], number: int) -> Case:
    if not {"image", "instruction"} <= fields.keys():
        raise ValueError("image or instruction is missing; a line needs both")
    wrong = [name for name, value in fields.items() if not isinstance(value, CASE_FIELDS.get(name, ()))]
    if wrong:
        raise ValueError(f"fields {wrong} are unknown or no text; known are {list(CASE_FIELDS)}")
    read = {name: _reader(directory, fields[name]) for name in ("image", "mask") if name in fields}
    task = _component(fields.get("task", "all"))
    name = _component(fields.get("key", f"{number:05d}"))
    rest = {name: fields.get(name, "") for name in ("edit_type", "object")}
    return Case(f"{task}/{name}", task, fields["instruction"], read["image"], mask=read.get("mask"), **rest)


def _reader(directory: epath.Path, name: str) -> Callable[[], Image.Image]:
    file = directory / name
    if ".." in epath.Path(name).parts or epath.Path(name).is_absolute():
        raise ValueError(f"{name!r} does not lie below the directory")
    if not file.is_file():
        raise ValueError(f"image {file} is not there, or is no file")
    return functools.partial(pictures.read, file)


def gedit(directory: epath.PathLike, languages: Sequence[str] = LANGUAGES) -> list[Case]:
    """GEdit-Bench from the parquet files of its Hugging Face data set (stepfun-ai/GEdit-Bench).

    Keys are `fullset/<task_type>/<language>/<key>`, the layout that its public scorer reads.

    Raises:
      ValueError: no parquet files there, columns missing, a row that is no case, or unknown languages.
    """
    import pyarrow.parquet as parquet

    if unknown := set(languages) - set(LANGUAGES):
        raise ValueError(f"unknown languages {sorted(unknown)}; choose from {LANGUAGES}")
    directory = epath.Path(directory)
    files = sorted([*directory.glob("*.parquet"), *directory.glob("*/*.parquet")])
    if not files:
        raise ValueError(
            f"{directory} holds no parquet files; give a local copy of the data set stepfun-ai/GEdit-Bench"
        )
    columns = ["key", "task_type", "instruction", "instruction_language"]
    cases = []
    for file in files:
        table = parquet.ParquetFile(file)
        image = next((name for name in ("input_image_raw", "input_image") if name in table.schema_arrow.names), None)
        missing = [name for name in columns if name not in table.schema_arrow.names]
        if missing or image is None:
            raise ValueError(f"{file} lacks the columns {missing or 'input_image_raw'}; is it GEdit-Bench?")
        images = _ImageColumn(table, image, str(file))
        for number, row in enumerate(table.read(columns).to_pylist()):
            if row["instruction_language"] in languages:
                try:
                    cases.append(_gedit_case(row, functools.partial(images.read, number)))
                except ValueError as error:
                    raise ValueError(f"{file} row {number}: {error}") from error
    return cases


def _gedit_case(row: Mapping[str, Any], read: Callable[[], Image.Image]) -> Case:
    if wrong := [name for name, value in row.items() if not isinstance(value, str)]:
        raise ValueError(f"{wrong} are no texts")
    task, language = row["task_type"], row["instruction_language"]
    key = "/".join(["fullset", *map(_component, (task, language, row["key"]))])
    return Case(key, task, row["instruction"], read, part=language)


class _ImageColumn:
    """Pictures of a parquet file by row number; one row group is kept in memory."""

    def __init__(self, table: Any, column: str, name: str):
        self._table, self._column, self._name = table, column, name
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        self._places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        self._group = functools.lru_cache(maxsize=1)(lambda group: table.read_row_group(group, [column]).column(0))

    def read(self, number: int) -> Image.Image:
        group, row = self._places[number]
        value = self._group(group)[row].as_py()
        data = value.get("bytes") if isinstance(value, Mapping) else value
        name = f"{self._column} of {self._name} row {number}"
        if not isinstance(data, bytes):
            raise ValueError(f"{name} holds no picture")
        return pictures.decode(data, name)


def dreambooth(directory: epath.PathLike) -> list[Case]:
    """Subject-driven customization: the data set of DreamBooth (google/dreambooth, its folder `dataset`).

    Each subject's first picture with each of the prompts for its kind (objects, or living subjects), as a new scene.

    Raises:
      ValueError: no prompts_and_classes.txt, or one of another form; a subject without pictures.
    """
    directory = epath.Path(directory)
    file = directory / "prompts_and_classes.txt"
    if not file.is_file():
        raise ValueError(f"{file} is not there; give a local copy of the folder `dataset` of google/dreambooth")
    text = file.read_text()
    classes = re.findall(r"^(\w+),([\w ]+?)\s*$", text, re.MULTILINE)
    lists = re.findall(r"prompt_list = \[(.*?)\]", text, re.DOTALL)
    prompts = [re.findall(r"'([^']*\{1\}[^']*)'", part) for part in lists]
    if len(prompts) != 2 or not all(prompts) or classes[:1] != [("subject_name", "class")]:
        raise ValueError(f"{file} has another form than that of google/dreambooth: classes, then two lists of prompts")
    cases = []
    for subject, kind in classes[1:]:
        images = sorted(path for path in (directory / subject).glob("*") if path.suffix.lower() in (".jpg", ".png"))
        if not images:
            raise ValueError(f"{directory / subject} holds no .jpg or .png")
        for number, prompt in enumerate(prompts[kind in ("cat", "dog")]):
            words = prompt.replace("{0}", "").replace("{1}", kind).replace("  ", " ")
            read = functools.partial(pictures.read, images[0])
            cases.append(Case(f"{subject}/{number:02d}", subject, words, read, object=kind))
    return cases


def digest(case: Case, image: Image.Image) -> str:
    """What tells a case's edit and figures from those of others with the same key, given its picture."""
    found = hashlib.sha256(json.dumps([case.instruction, case.edit_type, case.object]).encode())
    for each in (image, *([case.mask()] if case.mask else [])):
        found.update(str(each.size).encode() + each.tobytes())
    return found.hexdigest()


def _component(name: str) -> str:
    if not SAFE.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name!r} cannot name a file; use letters, digits, '_', '-' and '.'")
    return name


def iterate(cases: Sequence[Case]) -> Iterator[tuple[Case, Image.Image]]:
    """Cases with their pictures, read one at a time; raises ValueError naming the case whose picture does not read."""
    for case in cases:
        try:
            yield case, case.read()
        except ValueError as error:
            raise ValueError(f"case {case.key}: {error}") from error
