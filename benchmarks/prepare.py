"""Memory and time of a preparation as its input grows: `python benchmarks/prepare.py [--records 10000 100000]`.

Needs the extra `prepare`. Each size runs in a process of its own on Beam's local runner; the peak is of that process.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

PICTURES = 300
RUN = """
import resource, sys
from npedit_jax.data import prepare
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, status = peak(), prepare.main()
print(status, before, peak(), file=sys.stderr)
"""


def write_items(directory: pathlib.Path, records: int) -> pathlib.Path:
    """A list in the NP-Edit release's layout, over a few hundred small pictures."""
    import numpy as np
    import skimage.data
    from PIL import Image

    photograph = np.asarray(Image.fromarray(skimage.data.coffee()).resize((160, 128)))
    for number in range(PICTURES):
        turned = np.roll(photograph, number, axis=1)
        Image.fromarray(turned).save(directory / f"{number}.jpg", quality=75)
    path = directory / f"items-{records}.json"
    with path.open("w") as file:
        for number in range(records):
            item = {
                "id": f"item-{number}",
                "input_image_path": f"{number % PICTURES}.jpg",
                "edit_instruction": f"remove cup number {number}",
                "edited_caption": "a table without a cup",
                "input_description": "a cup on a table",
                "edit_type": ("remove", "style", "texture")[number % 3],
                "category": "cup",
                "dataset_source": "benchmark",
            }
            file.write(("[" if number == 0 else ",") + json.dumps(item))
        file.write("]")
    return path


def main() -> None:
    """Command line; prints a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        for records in arguments.records:
            command = [sys.executable, "-c", RUN, "--layout", "release", "--name", f"set{records}", "--min-side", "64"]
            command += ["--input", str(write_items(directory, records)), "--output", str(directory / "out")]
            begin = time.monotonic()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            status, before, peak = done.stderr.split()[-3:]
            row = {"records": records, "status": int(status), "MiB_before": int(before), "MiB_peak": int(peak)}
            print(json.dumps(row | {"seconds": round(time.monotonic() - begin, 1)}), flush=True)


if __name__ == "__main__":
    main()
