"""How fast a host makes batches of records: `python benchmarks/data.py [--torchvision PYTHON] [--workers 1 2]`.

Files are JPEGs of 1024 pixels and native detail: mosaics of the photographs that scikit-image and scikit-learn ship.

  decode     images a second of one core, file to the pixels of a bucket of about 512 px
  reference  the same files through the PyTorch release's transform (Pillow open and RGB, torchvision Resize of the
             short side with LANCZOS, CenterCrop, ToTensor), by another interpreter, in turn with `decode`
  batches    whole batches of the edit stage, texts and questions tokenized, without workers and with some

`images_per_core_s` are per second of processor time, of all worker processes together where there are some: another
program's load counts little, and a number that stays the same as workers are added says that they do not hinder one
another. `images_per_s` are by the clock; `main_ms` is the processor time per image of the process that hands batches
on. The best of the rounds stands.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time

SHAPES = {"1024x1024": (512, 512), "768x1024": (384, 512), "576x1024": (384, 640), "1024x819": (576, 448)}
QUALITY = 90
REFERENCE = """
import io, json, sys, time
import torch
from PIL import Image
from torchvision import transforms
torch.set_num_threads(1)
files, (height, width), seconds = json.loads(sys.argv[1])
transform = transforms.Compose([
    transforms.Resize(min(height, width), interpolation=transforms.InterpolationMode.LANCZOS),
    transforms.CenterCrop((height, width)), transforms.ToTensor()])
data = [open(file, "rb").read() for file in files]
count, begin = 0, time.process_time()
while time.process_time() - begin < seconds:
    for file in data:
        transform(Image.open(io.BytesIO(file)).convert("RGB"))
        count += 1
print(count / (time.process_time() - begin))
"""


def write_files(directory: pathlib.Path, shape: tuple[int, int], count: int = 16) -> list[str]:
    """Mosaics of two by two photographs at their own resolution, as JPEG files."""
    import numpy as np
    import skimage.data
    import sklearn.datasets
    from PIL import Image

    names = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")
    pictures = [
        np.asarray(getattr(skimage.data, name)()) for name in names
    ] + sklearn.datasets.load_sample_images().images
    height, width = shape
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        tiles = []
        for _ in range(4):
            picture = pictures[int(rng.integers(len(pictures)))]
            room = (max(0, height // 2 - picture.shape[0]), max(0, width // 2 - picture.shape[1]))
            picture = np.pad(picture, ((0, room[0]), (0, room[1]), (0, 0)), mode="reflect")
            top, left = (int(rng.integers(s - half + 1)) for s, half in zip(picture.shape, (height // 2, width // 2)))  # noqa: B905
            tiles.append(picture[top : top + height // 2, left : left + width // 2])
        mosaic = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
        files.append(str(directory / f"{height}x{width}-{number}.jpg"))
        Image.fromarray(mosaic).save(files[-1], quality=QUALITY)
    return files


def decode_rate(files: list[str], size: tuple[int, int], seconds: float) -> float:
    """Images per second of processor time."""
    from npedit_jax.data import images

    data = [pathlib.Path(file).read_bytes() for file in files]
    count, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        for file in data:
            images.decode(file, size)
        count += len(data)
    return count / (time.process_time() - begin)


def reference_rate(python: str, files: list[str], size: tuple[int, int], seconds: float) -> float:
    """As `decode_rate`, of the PyTorch release's transform."""
    task = json.dumps([files, size, seconds])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", REFERENCE, task], check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def edit_dataset(directory: pathlib.Path, files: list[str], size: tuple[int, int], batch: int):
    """The edit stage's batches of these files, at the full-size config's text lengths."""
    from configs.zimage import npedit
    from npedit_jax.data import pipeline, questions, records, tokenize
    from npedit_jax.data.batches import Feed
    from npedit_jax.data.sources import RecordSource

    height, width = (int(side) for side in pathlib.Path(files[0]).stem.split("-")[0].split("x"))
    kinds, texts = ("remove", "style", "replace"), "the small wooden chair next to the window"
    made = (
        records.Record(
            image=pathlib.Path(file).read_bytes() + bytes(number // len(files)),
            width=width,
            height=height,
            instruction=f"{kinds[number % 3]} number {number}: {texts} with a dark green armchair",
            edited_caption=f"photograph {number} of {texts}, in the evening, taken from the door of the room",
            input_caption=f"photograph {number} of {texts}",
            edit_type=kinds[number % 3],
            object=texts,
            id=str(number),
            source="benchmark",
        )
        for number, file in enumerate(files * 30)
    )
    found = records.write(directory / "records", "benchmark", made)
    golden = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "tokenizer"
    config = npedit.data()
    task = pipeline.Task(RecordSource({"set": found}, [size]), dict.fromkeys(kinds, 1 / 3), questions.EDITING)
    return pipeline.npedit(
        {"": task},
        Feed(0, batch),
        text=tokenize.TextTokenizer(golden, config.text_length),
        scorer=tokenize.ScorerTokenizer(golden, 256, 1536),  # a tokenizer of bytes: prompts are longer than Qwen's
        guidance=dict.fromkeys(kinds, 3.5),
    )


def batch_rates(dataset, workers: int, batch: int, seconds: float) -> dict[str, float]:
    """Rates after the first batches, see the module's docstring."""
    from npedit_jax.data.batches import Reading, iterate

    batches = iterate(dataset, Reading(workers=workers, buffer=1))
    for _ in range(3 * max(1, workers)):
        next(batches)
    children = [child.pid for child in multiprocessing.active_children()][-workers:] if workers else []
    count, clock, main, work = 0, time.monotonic(), time.process_time(), processor_time(children)
    while time.monotonic() - clock < seconds:
        next(batches)
        count += batch
    clock, main, work = time.monotonic() - clock, time.process_time() - main, processor_time(children) - work
    rates = {"images_per_core_s": count / (work if workers else main), "images_per_s": count / clock}
    return {name: round(rate, 1) for name, rate in rates.items()} | {"main_ms": round(1000 * main / count, 2)}


def processor_time(processes: list[int]) -> float:
    """Seconds that these processes have used, from /proc."""
    ticks = 0
    for process in processes:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Command line; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torchvision", default="", help="a Python that has torch and torchvision")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1, 2], help="processes; 0 is none beside this one"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    arguments = parser.parse_args()
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    result = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "decode": {}, "batches": {}}
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        for name, size in SHAPES.items():
            files = write_files(directory, tuple(map(int, name.split("x"))))
            kilobytes = sum(os.path.getsize(file) for file in files) / len(files) / 1000
            ours, theirs = [], []
            for _ in range(arguments.rounds):  # in turn, so that both see the same machine
                ours.append(round(decode_rate(files, size, arguments.seconds), 1))
                if arguments.torchvision:
                    theirs.append(round(reference_rate(arguments.torchvision, files, size, arguments.seconds), 1))
            entry = {"bucket": size, "kilobytes": round(kilobytes), "images_per_core_s": max(ours), "rounds": ours}
            if theirs:
                entry |= {
                    "reference": max(theirs),
                    "reference_rounds": theirs,
                    "ratio": round(max(ours) / max(theirs), 2),
                }
            result["decode"][name] = entry
            print(name, entry, file=sys.stderr)
        files = write_files(directory, (1024, 1024))
        dataset = edit_dataset(directory, files, (512, 512), batch=16)
        for workers in arguments.workers:
            seconds = 2 * arguments.seconds
            measured = [batch_rates(dataset, workers, 16, seconds) for _ in range(arguments.rounds)]
            result["batches"][f"{workers} workers"] = max(measured, key=lambda found: found["images_per_core_s"])
            print(workers, measured, file=sys.stderr)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
