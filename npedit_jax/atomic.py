"""Files and directories that appear whole or not at all, whatever ends the writing; in buckets as well."""

import contextlib
import uuid
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def file(path: epath.PathLike) -> Iterator[epath.Path]:
    """A path beside `path` to write a file at, which takes its place at the end, or goes on an error."""
    path = epath.Path(path)
    partial = path.with_name(partial_name(path.name))
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_name(name: str) -> str:
    """What a file is called until it is whole; a kill may leave one behind, which the next writing replaces."""
    return f".{name}.tmp"


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file: a kill leaves the old one or the new one."""
    with file(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def directory(path: epath.PathLike) -> Iterator[epath.Path]:
    """A directory beside `path`, new or empty, which takes its place at the end, or goes on an error."""
    path = epath.Path(path)
    # A kill may leave one behind: the next has another name.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise
