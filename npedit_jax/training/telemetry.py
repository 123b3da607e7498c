"""What a run tells about itself: metrics.jsonl, TensorBoard, Weights & Biases, profiles, a progress bar."""

import contextlib
import importlib
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tqdm
from etils import epath

from npedit_jax import atomic


class MetricsLog:
    """metrics.jsonl and TensorBoard of one working directory, written by process 0.

    One JSON object per logged step, `step` first; wall-clock figures under keys starting with `time/`. Opening it cuts
    the file back to the restored step, so that a resumed run continues the file of the interrupted one.
    """

    def __init__(self, workdir: epath.PathLike, *, restored_step: int, wandb_project: str = ""):
        """Opens the logs.

        Args:
          wandb_project: of Weights & Biases, whose package then has to be installed; "" leaves it out.
        """
        self._writes = jax.process_index() == 0
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._in_bucket = "://" in str(self._path)  # where a file cannot be appended to, rows wait for a checkpoint
        self._pending: list[str] = []
        self._wandb = None
        if not self._writes:
            return
        if wandb_project:
            path = str(epath.Path(workdir).resolve())
            # Of the directory, so that a restart goes on with the same curves, and of the whole path of it.
            id = f"{epath.Path(path).name}-{zlib.crc32(path.encode()):08x}"
            self._wandb = importlib.import_module("wandb").init(project=wandb_project, id=id, resume="allow")
        kept = read_metrics(workdir, up_to=restored_step) if self._path.exists() else []
        self._lines = [json.dumps(row) for row in kept]
        atomic.write_text(self._path, "".join(line + "\n" for line in self._lines))
        # Imported by runs alone: it takes PyTorch along where that is installed, and commands would wait for it.
        from tensorboardX import SummaryWriter

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
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        if not self._in_bucket:
            self.flush()

    def flush(self) -> None:
        """Puts every row so far where the file is; called before a checkpoint commits."""
        if not self._writes or not self._pending:
            return
        if self._in_bucket:
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
        if self._wandb is not None:
            self._wandb.finish()


class Work(NamedTuple):
    """What one step of a run works through, over all devices.

    Attributes:
      tokens: image and text tokens of all samples.
      flops: that the step's results need; 0 where they were not counted.
      peak_flops: FLOP/s of a device, None where it is not known.
    """

    samples: int
    tokens: int
    devices: int
    flops: float = 0.0
    peak_flops: float | None = None


class Meter:
    """How fast a run is, and what its time goes into; all figures since the last reading but where told.

    `time/step` and `time/data` are seconds a step and its wait for data; `time/samples_per_second`,
    `time/tokens_per_second`; `time/flops_per_device` and `time/mfu`, of the FLOPs that the step's results need;
    `time/compile`, seconds since this process began; `time/memory_peak`, GB of the fullest device of this host;
    `time/goodput`, share of the wall time since the run began, restarts included, that went into steps which count.
    """

    def __init__(self, workdir: epath.PathLike, restored_step: int, work: Work, clock: Callable[[], float] = time.time):
        self._work, self._clock = work, clock
        rows = read_metrics(workdir) if (epath.Path(workdir) / "metrics.jsonl").exists() else []
        self._began = rows[0].get("time/began", clock()) if rows else clock()  # also where no checkpoint came of it
        counted = [row for row in rows if row["step"] <= restored_step]
        self._productive = counted[-1].get("time/productive", 0.0) if counted else 0.0
        self._compiling = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._restart()

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiling += seconds

    def _restart(self) -> None:
        self._since, self._steps, self._waited, self._apart = self._clock(), 0, 0.0, 0.0
        self._compiled_before = self._compiling

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around the wait for a batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no part of a step: saving, previews."""
        start, compiled = self._clock(), self._compiling
        yield
        self._apart += self._clock() - start
        self._compiled_before += self._compiling - compiled  # is in that time already

    def count(self) -> None:
        """A step was begun."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The figures, see the class; the next ones count from here."""
        now, steps = self._clock(), max(self._steps, 1)
        compiled = self._compiling - self._compiled_before
        inside = max(now - self._since - self._apart - compiled, 1e-9)
        self._productive += inside
        seconds, work = inside / steps, self._work
        found = {
            "time/clock": now,
            "time/began": self._began,
            "time/productive": self._productive,
            "time/step": seconds,
            "time/data": self._waited / steps,
            "time/samples_per_second": work.samples / seconds,
            "time/tokens_per_second": work.tokens / seconds,
            "time/compile": self._compiling,
            "time/goodput": self._productive / max(now - self._began, self._productive),
        }
        if work.flops:
            found["time/flops_per_device"] = work.flops / work.devices / seconds
        if work.flops and work.peak_flops:
            found["time/mfu"] = work.flops / work.devices / seconds / work.peak_flops
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
        if max(peaks):
            found["time/memory_peak"] = max(peaks) / 1e9
        self._restart()
        return found


class Profiler:
    """Writes a jax.profiler trace of chosen steps to `workdir/profile`.

    Args:
      steps: the first and the last step of the trace; () for no trace.
    """

    def __init__(self, workdir: epath.PathLike, steps: Sequence[int]):
        self._directory = str(epath.Path(workdir) / "profile")
        self._first, self._last = steps or (-1, -1)
        self._running = False

    def before(self, step: int) -> None:
        """Called before a step is run."""
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Called after a step, whose results are waited for at the end of a trace."""
        if self._running and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


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


class _Terminal:
    """Standard error, or what is left of it: a run goes on where nobody reads its progress any longer."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def progress(total: int, start: int, label: str) -> tqdm.tqdm:
    """A progress bar with the time left; silent on all processes but the first, sparse when not on a terminal.

    Until the first step is done it says what is under way.
    """
    bar = tqdm.tqdm(
        total=total,
        initial=start,
        desc=label,
        unit="step",
        file=_Terminal(),
        disable=jax.process_index() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )
    bar.set_postfix_str("compiling, a minute or more")
    return bar
