"""The training command in a process of its own that can be killed; JAX is imported once for all of them."""

import atexit
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp

from npedit_jax.training import telemetry

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "tests/faults/tiny_config.py"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["npedit_jax.train", "npedit_jax.training.loop", "npedit_jax.training.previews"])


class Training:
    """`python -m npedit_jax.train --workdir WORKDIR ...`, started at once.

    Args:
      arguments: further ones; where they give no --config, that of this folder is taken.
      before: called in the process before the command.
    """

    def __init__(self, workdir: pathlib.Path, *arguments: str, before: Callable[[], Any] | None = None):
        self.log = pathlib.Path(_scratch()) / f"{time.monotonic_ns()}.log"
        if not any(argument.split("=")[0] == "--config" for argument in arguments):
            arguments = (f"--config={CONFIG}", *arguments)
        words = ["train", f"--workdir={workdir}", *arguments]
        self.process = CONTEXT.Process(target=_train, args=(words, str(self.log), before))
        self.process.start()
        weakref.finalize(self, self.process.kill)  # where a test fails, it may run on

    def wait(self, seconds: float = 120.0) -> int:
        """The exit status, minus the signal where one ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.output()}"
        return self.process.exitcode

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120.0) -> None:
        """Returns once the condition holds, which the command must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}: {self.output()}"
            assert time.monotonic() < deadline, f"nothing after {seconds} s: {self.output()}"
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text() if self.log.exists() else ""


@functools.cache
def _scratch() -> str:
    """A folder for output, removed when the tests end."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _train(words: list[str], log: str, before: Callable[[], Any] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    sys.argv = words  # where the config's library looks for changed fields
    import jax

    from npedit_jax import train

    jax.config.update("jax_disable_most_optimizations", True)
    if before:
        before()
    sys.exit(train.main(words))


def reached(workdir: pathlib.Path) -> int:
    """The newest step that a run of the config in this folder has finished."""
    return max((int(path.stem.removeprefix("step-")) for path in (workdir / "samples").glob("*.png")), default=0)


def saved(workdir: pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def outcome(workdir: pathlib.Path) -> tuple[list[dict[str, Any]], Any]:
    """Metrics without wall-clock fields, and the newest state."""
    rows = [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in telemetry.read_metrics(workdir)
    ]
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(workdir / "checkpoints" / str(saved(workdir)[-1]) / "state")
    return rows, state


def position(workdir: pathlib.Path, step: int) -> Any:
    """The place in the data that a checkpoint holds."""
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())
