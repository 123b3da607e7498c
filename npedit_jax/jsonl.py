"""Files of JSON objects, one a line, as people write them: what is wrong with a line is told with its number."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath


class Line(NamedTuple):
    """An object and where it stands: the number of its line, from 1, and a start of messages."""

    number: int
    origin: str
    fields: dict[str, Any]


def read(file: epath.Path) -> Iterator[Line]:
    """The objects of a file; blank lines are passed over.

    Raises:
      ValueError: a line is no JSON object in UTF-8.
    """
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        origin = f"{file} line {number}: "
        try:
            fields = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{origin}no JSON in UTF-8 ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{origin}expected a JSON object, found {type(fields).__name__}")
        yield Line(number, origin, fields)
