"""What is read from outside, given arbitrary bytes: `python -m tests.faults.fuzz TARGET --inputs N`.

A target takes bytes and may raise its documented errors alone. The command drives it by Atheris, whose libFuzzer
follows which branches an input takes; it prints the number of inputs and the peak memory of the process, and ends with
another status than 0 where something else was raised, the process crashed, or took more than MEMORY.
"""

import argparse
import io
import json
import pathlib
import re
import struct
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

MEMORY = 2048  # MiB
LARGEST = 4096  # bytes of an input
INSTRUMENTED = [
    "npedit_jax.weights",
    "npedit_jax.edit",
    "npedit_jax.jsonl",
    "npedit_jax.pictures",
    "npedit_jax.evaluation.cases",
    "npedit_jax.data.images",
    "npedit_jax.data.records",
]
BLOCK = 2**16  # bytes of an ArrayRecord file are written in blocks of this size


class Target(NamedTuple):
    """What is fuzzed: `run(data, folder)`, which may raise `errors`, from `seeds` that are whole."""

    run: Callable[[bytes, pathlib.Path], Any]
    errors: tuple[type[Exception], ...]
    seeds: list[bytes]


def _file(folder: pathlib.Path, name: str, data: bytes) -> pathlib.Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _safetensors(data: bytes, folder: pathlib.Path) -> None:
    from etils import epath

    from npedit_jax.weights import safetensors_io

    file = epath.Path(_file(folder, "a.safetensors", data))
    entries = safetensors_io.read_header(file)
    with safetensors_io.Reader() as reader:
        for entry in entries.values():
            reader.read(entry)


def _safetensors_seeds() -> list[bytes]:
    header = {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    header |= {"b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]}}
    text = json.dumps(header).encode()
    return [struct.pack("<Q", len(text)) + text + bytes(14), struct.pack("<Q", 2) + b"{}"]


def _weights_config(data: bytes, folder: pathlib.Path) -> None:
    from etils import epath

    from npedit_jax import weights
    from npedit_jax.weights.loading import read_config

    _file(folder, "config.json", data)
    config = read_config(epath.Path(folder))
    for kind in ("zimage", "autoencoder", "qwen3", "internvl", "llava_onevision"):
        try:
            weights.build(kind, config)
        except ValueError:
            continue


def _weights_config_seeds() -> list[bytes]:
    from tests import tiny_editor

    configs = [tiny_editor.AUTOENCODER, tiny_editor.TEXT_ENCODER, tiny_editor.STUDENT, tiny_editor.SCORER]
    return [json.dumps(config).encode() for config in configs]


def _run_config(data: bytes, folder: pathlib.Path) -> None:
    from npedit_jax.editor import read_config

    _file(folder, "config.json", data)
    read_config(folder)


def _run_config_seeds() -> list[bytes]:
    networks = dict.fromkeys(("autoencoder", "text_encoder", "student"), {"kind": "zimage", "directory": "x"})
    run = {"networks": networks, "optimizer": {}, "sampling": {"times": [1.0]}, "data": {"text_length": 4}}
    return [json.dumps(run).encode(), b"{}"]


def _requests(data: bytes, folder: pathlib.Path) -> None:
    from npedit_jax import edit

    edit.read_batch(_file(folder, "a.jsonl", data), 0)


def _cases(data: bytes, folder: pathlib.Path) -> None:
    from npedit_jax.evaluation import cases

    _file(folder, "a.png", b"")
    _file(folder, "instructions.jsonl", data)
    cases.folder(folder)


def _cases_seeds() -> list[bytes]:
    line = {"image": "a.png", "instruction": "make the circle red"}
    more = {"task": "color", "key": "x", "object": "circle", "edit_type": "remove", "mask": "a.png"}
    return [json.dumps(line).encode() + b"\n" + json.dumps(line | more).encode(), b"\n"]


def _requests_seeds() -> list[bytes]:
    line = {"image": "a.png", "instruction": "make the circle red", "output": "b.png", "seed": 3}
    return [json.dumps(line).encode(), b"\n" + json.dumps(line).encode() + b"\n\n", b"{}\n"]


def _image(data: bytes, folder: pathlib.Path) -> None:
    from npedit_jax import pictures

    pictures.decode(data)


def _image_seeds() -> list[bytes]:
    return _record_image_seeds() + [_encoded("P", kind) for kind in ("GIF", "BMP", "TIFF")]


def _record_image(data: bytes, folder: pathlib.Path) -> None:
    from npedit_jax.data import images

    images.read_size(data)
    images.decode(data, (8, 12))


def _record_image_seeds() -> list[bytes]:
    kinds = [("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP")]
    infinite = b"Exif\0\0II*\0" + struct.pack("<IHHHIfI", 8, 1, 0x0112, 11, 1, float("inf"), 0)  # a FLOAT
    return [_encoded(mode, kind) for mode, kind in kinds] + [_encoded("RGB", "JPEG", infinite)]


def _encoded(mode: str, kind: str, exif: bytes = b"") -> bytes:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8))
    turned, data = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    picture.convert("L" if mode == "I;16" else mode).convert(mode).save(data, format=kind, exif=exif or turned)
    return data.getvalue()


def _record(data: bytes, folder: pathlib.Path) -> None:
    from npedit_jax.data import records

    records.decode(data)


def _record_seeds() -> list[bytes]:
    from npedit_jax.data import records

    return [records.encode(records.Record(b"image", 9, 6, "remove it", "a", "b", "remove", "it", "0", "set"))]


def _array_record(data: bytes, folder: pathlib.Path) -> None:
    """The input is what is not padding: two bytes of length, then that much of the first block, then the second."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    middle = 2 + int.from_bytes(data[:2], "little")
    whole = b"".join(part[:BLOCK].ljust(BLOCK, b"\0") for part in (data[2:middle], data[middle:]))
    with ArrayRecordDataSource([str(_file(folder, "a.array_record", whole))]) as source:
        for number in range(min(len(source), 8)):
            source[number]


def _array_record_seeds() -> list[bytes]:
    from array_record.python.array_record_module import ArrayRecordWriter

    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for options in ("group_size:1", "group_size:1,uncompressed"):
            writer = ArrayRecordWriter(f"{folder}/a", options)
            for number in range(3):
                writer.write(bytes([number]) * 20)
            writer.close()
            data = pathlib.Path(folder, "a").read_bytes()
            first, second = data[:BLOCK].rstrip(b"\0"), data[BLOCK:].rstrip(b"\0")
            seeds.append(len(first).to_bytes(2, "little") + first + second)
    return seeds


def target(name: str) -> Target:
    """A target by name.

    Raises:
      KeyError: there is none.
    """
    run, errors, seeds = {
        "safetensors": (_safetensors, (ValueError,), _safetensors_seeds),
        "weights_config": (_weights_config, (ValueError,), _weights_config_seeds),
        "run_config": (_run_config, (ValueError,), _run_config_seeds),
        "requests": (_requests, (ValueError,), _requests_seeds),
        "cases": (_cases, (ValueError,), _cases_seeds),
        "image": (_image, (ValueError,), _image_seeds),
        "record_image": (_record_image, (ValueError,), _record_image_seeds),
        "record": (_record, (ValueError,), _record_seeds),
        "array_record": (_array_record, (ValueError, RuntimeError, OSError, IndexError), _array_record_seeds),
    }[name]
    return Target(run, errors, seeds())


NAMES = (
    "safetensors",
    "weights_config",
    "run_config",
    "requests",
    "cases",
    "image",
    "record_image",
    "record",
    "array_record",
)


def check(chosen: Target, data: bytes, folder: pathlib.Path) -> bool:
    """Whether the input was taken; whatever is raised but the documented errors goes through."""
    try:
        chosen.run(data, folder)
    except chosen.errors:
        return False
    return True


def _peak() -> int:
    """The most memory that this process has had, in MiB; `getrusage` would give the starting process's as well."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--inputs", type=int, default=20_000)
    given = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import npedit_jax.data.images
        import npedit_jax.data.records
        import npedit_jax.edit
        import npedit_jax.editor
        import npedit_jax.evaluation.cases
        import npedit_jax.weights.loading  # noqa: F401
    chosen, counts = target(given.target), [0, 0]
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "corpus").mkdir()
    for number, seed in enumerate(chosen.seeds):
        (folder / "corpus" / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        counts[0] += 1
        counts[1] += check(chosen, data, folder)
        if counts[0] == given.inputs:
            print(f"{given.target}: {counts[0]} inputs, {counts[1]} taken, peak {_peak()} MiB", flush=True)

    options = [f"-runs={given.inputs}", f"-rss_limit_mb={MEMORY}", f"-max_len={LARGEST}", "-seed=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, "-timeout=30", str(folder / "corpus")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
