"""The public edit sets as they come, read span by span: each layout tells where its items are and what they mean.

An item is a JSON object. Text files are cut into spans of bytes, data sets on disk into spans of rows, so that workers
read them side by side and none holds more than an item.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from npedit_jax.data import edit_types, images, saved_sets
from npedit_jax.data.records import Record

_BLOCK = 2**20
_LARGEST_ITEM = 16 * 2**20
_BETWEEN = b"\xef\xbb\xbf[, \t\r\n"  # what stands between the objects of a list, and before them
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"?|[{}]', re.DOTALL)


class Rejected(ValueError):
    """An item that becomes no record; `reason` is one word to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive items: bytes [start, stop) of a file, or rows of a data set."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Item:
    """One item and where it stands, for the log; `data` is None where it is no JSON object."""

    place: str
    data: Mapping[str, Any] | None


# (item, image root, set name) -> records, or Rejected
Meaning = Callable[[Item, epath.Path, str], Sequence[Record]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A set on disk.

    Attributes:
      paths: of its files or data sets.
      root: what image paths are relative to; "" for the directory of the file that names them.
      meaning: turns an item into records.
      reader: reads files of this kind.
    """

    paths: tuple[str, ...]
    root: str
    meaning: Meaning
    reader: "TextReader | RowReader"

    def spans(self, items: int) -> list[Span]:
        """Spans of at most so many items, in order."""
        return [span for path in self.paths for span in self.reader.spans(path, items)]

    def records(self, span: Span, name: str) -> Iterator[Record | tuple[str, Rejected]]:
        """The records of a span, and in the place of an item that becomes none its place and why."""
        root = epath.Path(self.root or epath.Path(span.path).parent)
        for item in self.reader.items(span):
            try:
                if item.data is None:
                    raise Rejected("json", "no JSON object")
                yield from self.meaning(item, root, name)
            except Rejected as error:
                yield item.place, error


class TextReader:
    """JSON lines, or one JSON list of objects: told apart by the first line."""

    def spans(self, path: str, items: int) -> Iterator[Span]:
        """Cuts a file after every so many items; holds no more than an item.

        Raises:
          ValueError: a list that is cut off, or of which an object has no end: what comes after it cannot be told.
        """
        start, count, stop = 0, 0, 0
        for begin, data in self._scan(path, 0, None):
            if count == items:
                yield Span(path, start, begin)
                start, count = begin, 0
            count, stop = count + 1, begin + len(data)
        if count:
            yield Span(path, start, stop)

    def items(self, span: Span) -> Iterator[Item]:
        """The items of a span."""
        for begin, data in self._scan(span.path, span.start, span.stop):
            try:
                found = json.loads(data)
            except (ValueError, RecursionError):  # UnicodeDecodeError is one
                found = None
            yield Item(f"{span.path}@{begin}", found if isinstance(found, dict) else None)

    def _scan(self, path: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
        with epath.Path(path).open("rb") as file:
            is_list = _is_list(file)
            file.seek(start)
            try:
                yield from (_objects if is_list else _lines)(file, start, stop)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error


def _is_list(file: Any) -> bool:
    """Whether a file is a list: it begins with a bracket, and that is no whole line before others."""
    first = file.readline(_BLOCK)
    while first and not first.strip(b"\xef\xbb\xbf \t\r\n"):
        first = file.readline(_BLOCK)
    if not first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not file.read(_BLOCK).strip()


def _lines(file: Any, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with where they begin."""
    for line in file:
        if stop is not None and start >= stop:
            return
        if line.strip():
            yield start, line
        start += len(line)


def _objects(file: Any, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Outermost {...}, and whatever else stands between them, with where they begin.

    Raises:
      ValueError: an object or the list itself does not end.
    """
    buffer, place = b"", 0  # the buffer stands at byte `start` of the file
    while stop is None or start + place < stop:
        begin = buffer.find(b"{", place)
        end = _closing(buffer, begin) if begin >= 0 else -1
        if end > 0:
            if between := buffer[place:begin].strip(_BETWEEN):
                yield start + place, between
            if stop is not None and start + begin >= stop:
                return
            yield start + begin, buffer[begin:end]
            place = end
            continue
        block = file.read(_BLOCK)
        if begin >= 0 and (not block or len(buffer) - begin > _LARGEST_ITEM):
            raise ValueError(
                f"the object that begins at byte {start + begin} does not end; mend or fetch the file anew"
            )
        if not block:
            rest = buffer[place:].strip(_BETWEEN)
            if not rest.endswith(b"]"):
                raise ValueError(f"the list is cut off after byte {start + place}; fetch the file anew")
            if rest[:-1].strip(_BETWEEN):
                yield start + place, rest[:-1]
            return
        buffer, start, place = buffer[place:] + block, start + place, 0


def _closing(buffer: bytes, begin: int) -> int:
    """Where the object that begins here ends; -1 where the buffer ends first."""
    depth = 0
    for token in _TOKEN.finditer(buffer, begin):
        text = token.group()
        if text[:1] == b'"':
            if len(text) == 1 or text[-1:] != b'"':
                return -1
            continue
        depth += 1 if text == b"{" else -1
        if depth == 0:
            return token.end()
    return -1


class RowReader:
    """Rows of a data set that can be read at random: `open(path)` gives a sequence of mappings."""

    def __init__(self, open: Callable[[str], Sequence[Mapping[str, Any]]]):
        self._open = open

    def spans(self, path: str, items: int) -> Iterator[Span]:
        """Cuts the rows evenly."""
        rows = len(self._open(path))
        for start in range(0, rows, items):
            yield Span(path, start, min(start + items, rows))

    def items(self, span: Span) -> Iterator[Item]:
        """The rows of a span."""
        rows = self._open(span.path)
        for number in range(span.start, span.stop):
            yield Item(f"{span.path}[{number}]", rows[number])


def release(item: Item, root: epath.Path, name: str) -> list[Record]:
    """`merged_edit_data.json` of the NP-Edit release."""
    get = _getter(item)
    image = _read(root, get("input_image_path"))
    return [
        _record(
            image,
            instruction=get("edit_instruction"),
            edited_caption=get("edited_caption"),
            input_caption=get("input_description"),
            edit_type=edit_types.plain(get("edit_type")),
            object=get("category"),
            id=get("id") or item.place,
            source=get("dataset_source") or name,
        )
    ]


def pico_banana(item: Item, root: epath.Path, name: str) -> list[Record]:
    """pico-banana-400k's `sft.jsonl`, after its own script has added `local_input_image`; it has no captions."""
    get = _getter(item)
    image = _read(root, get("local_input_image"))
    edit_type = edit_types.from_pico_banana(get("edit_type"))
    id = epath.Path(get("output_image")).with_suffix("").name or item.place
    return [_record(image, instruction=get("text"), edit_type=edit_type, id=id, source=name)]


def gpt_image_edit(item: Item, root: epath.Path, name: str) -> list[Record]:
    """GPT-Image-Edit-1.5M's `<set>/<task>/metadata/*.json`, images relative to the task's directory."""
    get = _getter(item)
    directory = epath.Path(item.place.rsplit("@", 1)[0]).parent.parent
    return [
        _record(
            _read(directory, get("input")),
            instruction=get("instruction"),
            input_caption=get("input_description"),
            edit_type=edit_types.from_gpt_image_edit(get("task")),
            id=get("id") or item.place,
            source=get("dataset_source") or name,
        )
    ]


def plain(item: Item, root: epath.Path, name: str) -> list[Record]:
    """Our own field names; `image` is a path, or the file itself in rows of a data set. Any text may be missing."""
    get = _getter(item)
    texts = ("instruction", "edited_caption", "input_caption", "object")
    edit_type = edit_types.plain(get("edit_type"))
    return [
        _record(
            _image_of(item, root),
            **{field: get(field) for field in texts},
            edit_type=edit_type,
            id=get("id") or item.place,
            source=get("source") or name,
        )
    ]


def customization(item: Item, root: epath.Path, name: str) -> list[Record]:
    """`image` shows a subject; each of `prompts` (or `prompt`) asks for a scene with it and describes that scene."""
    get = _getter(item)
    prompts = item.data.get("prompts") or [get("prompt")]
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise Rejected("json", f"expected prompts to be a list of texts; found {prompts!r}")
    prompts = [_text("prompts", prompt) for prompt in prompts]
    image, id = _image_of(item, root), get("id") or item.place
    return [
        _record(
            image,
            instruction=prompt,
            edited_caption=prompt,
            input_caption=get("input_caption"),
            edit_type=edit_types.CUSTOMIZATION,
            object=get("object"),
            id=f"{id}/{number}",
            source=name,
        )
        for number, prompt in enumerate(prompts)
    ]


MEANINGS: Mapping[str, Meaning] = {
    "release": release,
    "pico_banana": pico_banana,
    "gpt_image_edit": gpt_image_edit,
    "folder": plain,
    "customization": customization,
    "tfds": plain,
    "huggingface": plain,
}
_OPENERS = {"tfds": saved_sets.open_tfds, "huggingface": saved_sets.open_huggingface}


def layout(
    kind: str, paths: Sequence[str], root: str = "", fields: Mapping[str, str] | None = None, split: str = ""
) -> Layout:
    """A set in one of the known layouts.

    Args:
      kind: a name of MEANINGS.
      paths: files, or directories of data sets; a * stands for anything.
      root: what image paths are relative to; by default the directory of the file that names them.
      fields: names that a set has for ours, {"instruction": "edit_prompt"}.
      split: of a data set; by default train, or the only one.

    Raises:
      ValueError: an unknown kind, or a split of files that have none.
      FileNotFoundError: a path that leads nowhere.
    """
    if kind not in MEANINGS:
        raise ValueError(f"unknown layout {kind!r}; choose one of {tuple(MEANINGS)}")
    if split and kind not in _OPENERS:
        raise ValueError(f"the layout {kind!r} has no splits; leave out {split!r}")
    found = [str(path) for pattern in paths for path in _expand(pattern)]
    meaning = MEANINGS[kind]
    if fields:
        meaning = _Renamed(meaning, dict(fields))
    reader = RowReader(functools.partial(_OPENERS[kind], split=split)) if kind in _OPENERS else TextReader()
    return Layout(tuple(found), root, meaning, reader)


@dataclasses.dataclass(frozen=True)
class _Renamed:
    """A meaning of items whose fields have other names."""

    meaning: Meaning
    fields: Mapping[str, str]

    def __call__(self, item: Item, root: epath.Path, name: str) -> Sequence[Record]:
        renamed = dict(item.data) | {ours: item.data.get(theirs) for ours, theirs in self.fields.items()}
        return self.meaning(dataclasses.replace(item, data=renamed), root, name)


def _expand(pattern: str) -> list[epath.Path]:
    path = epath.Path(pattern)
    if "*" not in pattern:
        if not path.exists():
            raise FileNotFoundError(f"no file or directory at {pattern}")
        return [path]
    fixed = next(parent for parent in path.parents if "*" not in str(parent))
    found = sorted(fixed.glob(str(path.relative_to(fixed))))
    if not found:
        raise FileNotFoundError(f"nothing matches {pattern}")
    return found


def _getter(item: Item) -> Callable[[str], str]:
    """Reads a field as a text."""
    return lambda name: _text(name, item.data.get(name))


def _text(name: str, value: Any) -> str:
    """A value as a text: null is the empty text, numbers are written out; raises Rejected for anything else."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is not None and not isinstance(value, str | int | float):
        raise Rejected("json", f"expected {name} to be a text; found {type(value).__name__}")
    text = "" if value is None else str(value).strip()
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Rejected("json", f"{name} holds half a character, which no encoding can write")
    return text


def _image_of(item: Item, root: epath.Path) -> bytes:
    """The image of an item: bytes, Hugging Face's {"bytes", "path"}, or a path under `image` or `file_name`."""
    value = item.data.get("image")
    if isinstance(value, np.ndarray):
        raise Rejected("no_image", f"expected image to be a file or its path; found pixels of shape {value.shape}")
    value = value or item.data.get("file_name")
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) else _read(root, value or "")


def _read(root: epath.Path, path: str) -> bytes:
    if not path or not isinstance(path, str):
        raise Rejected("no_image", "the item names no image")
    try:
        return (root / path).read_bytes()
    except (OSError, ValueError) as error:
        raise Rejected("missing_file", f"{root / path}: {error}") from error


def _record(image: bytes, **fields: str) -> Record:
    """A record whose image can at least be opened; its size is read from the file, whatever the set says."""
    try:
        size = images.read_size(image)
    except images.BadImage as error:
        raise Rejected(error.reason, str(error)) from error
    texts = dict.fromkeys(("instruction", "edited_caption", "input_caption", "edit_type", "object"), "")
    return Record(image=image, width=size.width, height=size.height, **(texts | fields))
