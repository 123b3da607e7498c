"""Edits pictures: `python -m npedit_jax.edit --checkpoint RUN --image F --instruction S --output G`.

Many at once, in batches: `--batch FILE.jsonl` with lines {"image": F, "instruction": S, "output": G}, and "seed": N
where it is to differ from --seed. Everything is checked before the first picture is made. Outputs are PNG, with the
instruction, the seed and the checkpoint in their metadata.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm
from absl import logging
from etils import epath
from PIL import Image, PngImagePlugin

from npedit_jax.editor import Editor, upright

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


def read_batch(file: epath.PathLike, seed: int) -> list[Request]:
    """The requests of a JSONL file, `seed` where a line has none; blank lines are passed over.

    Raises:
      ValueError: there is no such file, no request in it, or a line, which is numbered, is not a request.
    """
    file = epath.Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not there, or is no file; give --batch a JSONL file")
    requests = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        origin = f"{file} line {number}: "
        with _saying(origin):
            if line.strip():
                requests.append(Request(**({"seed": seed} | _parse(line)), origin=origin))
    if not requests:
        raise ValueError(f"{file} holds no requests; give one JSON object per line")
    return requests


def _parse(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON in UTF-8 ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, found {type(fields).__name__}")
    if missing := [name for name in FIELDS if name not in fields and name != "seed"]:
        raise ValueError(f"{', '.join(missing)} missing; a line needs image, instruction and output")
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise ValueError(f"unknown fields {', '.join(unknown)}; known are {', '.join(FIELDS)}")
    for name, value in fields.items():
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            raise ValueError(f"{name} must be of type {FIELDS[name].__name__}, found {value!r}")
    return fields


def read_image(file: epath.PathLike) -> np.ndarray:
    """A picture as uint8 [H, W, 3], upright; raises ValueError where there is none or it does not decode."""
    file = epath.Path(file)
    if not file.is_file():
        raise ValueError(f"image {file} is not there, or is no file")
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(upright(image))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"image {file} does not decode: it is of no known format") from error
    except Exception as error:  # the decoders raise whatever they stumble over: SyntaxError, struct.error, ...
        raise ValueError(f"image {file} does not decode: {error}") from error


def check_output(output: str) -> None:
    """Raises ValueError where the output has no folder to go to or another suffix than .png."""
    path = epath.Path(output)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output {output} must end in .png: that is the format written")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of output {output} is missing; create {path.parent} first")
    if path.is_dir():
        raise ValueError(f"output {output} is a folder; give a file")


def write_png(pixels: np.ndarray, request: Request, checkpoint: str) -> None:
    """Writes uint8 [H, W, 3]; the file appears whole or not at all."""
    notes = PngImagePlugin.PngInfo()
    for key, value in (("instruction", request.instruction), ("seed", request.seed), ("checkpoint", checkpoint)):
        notes.add_text(key, str(value))
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG", pnginfo=notes)
    output = epath.Path(request.output)
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_bytes(data.getvalue())
        partial.replace(output)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def edit(checkpoint: str, requests: list[Request], *, raw: bool = False) -> None:
    """Checks all requests, then makes and writes the edits, batched by size.

    Raises:
      ValueError: a request or the checkpoint directory is wrong; nothing has been written then.
    """
    images = []
    outputs: dict[str, Request] = {}
    for request in requests:
        with _saying(request.origin):
            images.append(read_image(request.image))
            check_output(request.output)
            if outputs.setdefault(str(epath.Path(request.output).resolve()), request) is not request:
                raise ValueError(f"output {request.output} is asked for twice")
    # After the files: loading a large network takes a while, and a mistyped name should be told at once.
    editor = Editor.from_checkpoint(checkpoint, raw=raw)
    for request, image in zip(requests, images, strict=True):
        with _saying(request.origin):
            editor.check(image.shape[1], image.shape[0], request.instruction, request.seed)

    with tqdm.tqdm(total=len(requests), desc="edit", unit="edit", disable=None if len(requests) > 1 else True) as bar:
        for rows, size in _batches(images):
            chosen = [requests[row] for row in rows]
            instructions, seeds = [request.instruction for request in chosen], [request.seed for request in chosen]
            stacked = np.stack([images[row] for row in rows])
            edited = editor.edit_batch(stacked, instructions, seeds, batch_size=size)
            for request, pixels in zip(chosen, edited, strict=True):
                write_png(pixels, request, checkpoint)
            bar.update(len(rows))


def _batches(images: list[np.ndarray]) -> Iterator[tuple[list[int], int]]:
    """Rows of pictures of one size, at most BATCH_SIZE, and the batch size to fill them up to."""
    by_size = collections.defaultdict(list)
    for row, image in enumerate(images):
        by_size[image.shape].append(row)
    for rows in by_size.values():
        size = min(BATCH_SIZE, len(rows))
        for start in range(0, len(rows), size):
            yield rows[start : start + size], size


@contextlib.contextmanager
def _saying(origin: str) -> Iterator[None]:
    """Puts where a request came from before what was wrong with it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{origin}{error}") from error


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and one line where it cannot edit."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.edit", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="working directory of a training run")
    parser.add_argument("--image", help="picture to edit")
    parser.add_argument("--instruction", help="what to do, such as 'make the circle red'")
    parser.add_argument("--output", help="PNG file to write")
    parser.add_argument("--batch", metavar="FILE.jsonl", help="edit many: one JSON object per line")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; other seeds give other pictures")
    parser.add_argument("--raw", action="store_true", help="the parameters as trained instead of their average")
    arguments = parser.parse_args(argv)
    single = (arguments.image, arguments.instruction, arguments.output)
    if arguments.batch is None and None in single:
        parser.error("give --image, --instruction and --output, or --batch")
    if arguments.batch is not None and single != (None, None, None):
        parser.error("--batch goes without --image, --instruction and --output; its lines give them")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a checkpoint opened to be read is read-only
    try:
        if arguments.batch is None:
            requests = [Request(*single, seed=arguments.seed)]
        else:
            requests = read_batch(arguments.batch, arguments.seed)
        edit(arguments.checkpoint, requests, raw=arguments.raw)
    except (ValueError, OSError) as error:
        sys.exit(f"edit: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
