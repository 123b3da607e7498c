"""Edits images: `python -m npedit_jax.edit --checkpoint RUN --image F --instruction "make the circle red" --output G`.

Many at once: `--batch FILE.jsonl`, a line {"image", "instruction", "output"} and optionally "seed" for each.
"""

import argparse
import collections
import dataclasses
import json
import sys

import numpy as np
from etils import epath
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from npedit_jax.editor import BATCH, Editor, text_tokenizer
from npedit_jax.training import workdirs


@dataclasses.dataclass(frozen=True)
class Request:
    """One edit: paths of input and output, what to do, and the seed of its noise."""

    image: str
    instruction: str
    output: str
    seed: int = 0


def read_requests(path: epath.PathLike, seed: int) -> list[Request]:
    """The requests of a JSON-lines file; a line without a seed gets `seed`.

    Raises:
      ValueError: a line that is no such object; the message gives its number.
    """
    requests = []
    for number, line in enumerate(epath.Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            request = Request(**({"seed": seed} | fields))
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of {path} is no request: {error}") from error
        texts = (request.image, request.instruction, request.output)
        if not all(isinstance(text, str) for text in texts) or not isinstance(request.seed, int):
            raise ValueError(f"line {number} of {path}: image, instruction and output are strings, seed is a number")
        requests.append(request)
    if not requests:
        raise ValueError(f"{path} holds no request")
    return requests


def read_image(path: epath.PathLike) -> np.ndarray:
    """Pixels of an image file, uint8 [H, W, 3].

    Raises:
      ValueError: there is no such file, or it does not decode.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} does not decode as an image: {error}") from error


def edit_all(requests: list[Request], run: epath.PathLike, *, raw: bool = False) -> None:
    """Checks every request, edits in batches of one image size, then writes the PNG files.

    Raises:
      WorkdirError: `run` is no run of an editor.
      ValueError: a request that cannot be carried out. Nothing has been written then.
    """
    tokenizer = text_tokenizer(workdirs.read_config(run))
    images = [read_image(request.image) for request in requests]
    for request in requests:
        tokenizer([request.instruction])
        if not epath.Path(request.output).parent.is_dir():
            raise ValueError(f"there is no folder {epath.Path(request.output).parent} for {request.output}; make it")
    editor = Editor.from_checkpoint(run, raw=raw)
    by_size = collections.defaultdict(list)
    for index, image in enumerate(images):
        by_size[image.shape].append(index)
    edited: dict[int, np.ndarray] = {}
    for indices in by_size.values():
        for start in range(0, len(indices), BATCH):
            chosen = indices[start : start + BATCH]
            # A short batch is filled up: another size would be another program.
            filled = chosen if len(indices) <= BATCH else chosen + chosen[:1] * (BATCH - len(chosen))
            made = editor.edit_batch(
                np.stack([images[i] for i in filled]),
                [requests[i].instruction for i in filled],
                [requests[i].seed for i in filled],
            )
            edited |= dict(zip(chosen, made, strict=False))
    for index, request in enumerate(requests):
        write_png(edited[index], request, run)


def write_png(pixels: np.ndarray, request: Request, run: epath.PathLike) -> None:
    """Writes a PNG that tells how it was made."""
    facts = PngImagePlugin.PngInfo()
    for name, value in (("instruction", request.instruction), ("seed", request.seed), ("checkpoint", run)):
        facts.add_text(name, str(value))
    with epath.Path(request.output).open("wb") as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=facts)


def main(argv: list[str] | None = None) -> None:
    """Command line; what the user can mend is told in one line, with exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.edit", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="working directory of a training run")
    parser.add_argument("--image", help="the image to edit")
    parser.add_argument("--instruction", help="what to do")
    parser.add_argument("--output", help="the PNG to write")
    parser.add_argument("--batch", help="a JSON-lines file of requests, instead of the three above")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--raw", action="store_true", help="the parameters as trained instead of their average")
    arguments = parser.parse_args(argv)
    single = (arguments.image, arguments.instruction, arguments.output)
    if bool(arguments.batch) == any(single) or (any(single) and not all(single)):
        parser.error("give --image, --instruction and --output, or --batch alone")
    try:
        if arguments.batch:
            requests = read_requests(arguments.batch, arguments.seed)
        else:
            requests = [Request(*single, seed=arguments.seed)]
        edit_all(requests, arguments.checkpoint, raw=arguments.raw)
    except (workdirs.WorkdirError, ValueError, OSError) as error:
        sys.exit(f"edit: {error}")


if __name__ == "__main__":
    main()
