"""What a run tells about itself: metrics.jsonl, TensorBoard, a progress bar."""

import json
import math
import sys
from collections.abc import Mapping

import jax
import tqdm
from etils import epath
from tensorboardX import SummaryWriter

from npedit_jax.training.workdirs import write_whole


class MetricsLog:
    """metrics.jsonl and TensorBoard of one working directory, written by process 0.

    One JSON object per logged step, `step` first; wall-clock figures under keys starting with `time/`. Opening it cuts
    the file back to the restored step, so that a resumed run continues the file of the interrupted one.
    """

    def __init__(self, workdir: epath.PathLike, *, restored_step: int):
        self._writes = jax.process_index() == 0
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._pending: list[str] = []
        if not self._writes:
            return
        kept = read_metrics(workdir, up_to=restored_step) if self._path.exists() else []
        self._lines = [json.dumps(row) for row in kept]
        write_whole(self._path, "".join(line + "\n" for line in self._lines))
        self._board = SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=restored_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one row. Values that are not finite are written as null."""
        if not self._writes:
            return
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.append(json.dumps(row))
        self._pending.append(self._lines[-1])
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Puts every row so far on disk; called before a checkpoint commits."""
        if not self._writes or not self._pending:
            return
        if isinstance(self._path, epath.Path) and "://" in str(self._path):
            # Buckets cannot be appended to.
            self._path.write_text("".join(line + "\n" for line in self._lines))
        else:
            with self._path.open("a") as file:
                file.write("".join(line + "\n" for line in self._pending))
        self._pending.clear()
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes both logs."""
        self.flush()
        if self._writes:
            self._board.close()


def read_metrics(workdir: epath.PathLike, *, up_to: float = math.inf) -> list[dict[str, float]]:
    """The rows of metrics.jsonl up to a step; a last line cut short by a crash is left out."""
    rows = []
    for line in (epath.Path(workdir) / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > up_to:
            break
        rows.append(row)
    return rows


def progress(total: int, start: int, label: str) -> tqdm.tqdm:
    """A progress bar with the time left; silent on all processes but the first, sparse when not on a terminal."""
    return tqdm.tqdm(
        total=total,
        initial=start,
        desc=label,
        unit="step",
        disable=jax.process_index() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )
