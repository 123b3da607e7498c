"""A data pipeline that dies or hangs: told, never waited for in silence."""

import functools
import itertools
import os
import pathlib
import signal
import time

import grain
import numpy as np
import pytest
from absl import flags

from npedit_jax.training import loop
from npedit_jax.training.faults import DataStall, RunFault
from npedit_jax.training.watched import Watched
from tests.faults.command import Training, reached, saved


class Die(grain.transforms.Map):
    """Kills the process that maps element 3, as the system does where memory runs out."""

    def map(self, element):
        if element == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return element


def test_killed_worker_is_told():
    flags.FLAGS.mark_as_parsed()  # Grain reads some of its own
    dataset = grain.MapDataset.range(8).map(Die()).to_iter_dataset()
    batches = Watched(iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=1))), seconds=60)
    with pytest.raises(RunFault, match="data pipeline failed: Worker process was terminated"):
        for _ in range(8):
            next(batches)


def test_hanging_batch_is_told_in_time():
    class Hang:
        def __next__(self):
            time.sleep(600)

    started = time.monotonic()
    with pytest.raises(DataStall, match="no batch came within 0.2 s"):
        next(Watched(Hang(), seconds=0.2))
    assert time.monotonic() - started < 5


def test_errors_end_and_place_are_passed_on():
    class Counting:
        def __init__(self):
            self.place = 0

        def __next__(self):
            self.place += 1
            if self.place == 2:
                raise KeyError("caption")
            if self.place > 3:
                raise StopIteration
            return self.place

        def get_state(self):
            return self.place

        def set_state(self, place):
            self.place = place

    batches = Watched(Counting(), seconds=60)
    assert next(batches) == 1
    with pytest.raises(KeyError, match="caption"):
        next(batches)
    assert list(batches) == [3]
    batches.set_state(2)
    assert next(batches) == 3 and batches.get_state() == 3


def _patient_with_the_first(count, seconds):
    """A busy machine may take its time with these batches; later ones have so many seconds each."""
    take, taken = Watched.__next__, itertools.count(1)

    def next_batch(self):
        batch = take(self)
        self._seconds = seconds if next(taken) >= count else self._seconds
        return batch

    Watched.__next__ = next_batch


def _hang_at_batch_nine():
    _patient_with_the_first(9, seconds=1.0)
    iterate = loop.iterate

    def hanging(dataset, reading):
        return iterate(dataset.map_with_index(_sleep_from_nine), reading)

    loop.iterate = hanging


def _sleep_from_nine(index, batch):
    if index >= 9:
        time.sleep(3600)
    return batch


def test_command_ends_although_a_thread_of_it_hangs(tmp_path):
    run = Training(tmp_path / "run", "--config.steps=40", before=_hang_at_batch_nine)
    assert run.wait() == 1
    assert "train: no batch came within 1 s (config.guard.data_seconds)" in run.output().splitlines()[-1]
    assert saved(tmp_path / "run")[-1] == 8


def _workers(run) -> list[int]:
    """Processes of the run that make batches."""
    threads = pathlib.Path(f"/proc/{run.process.pid}/task").glob("*/children")  # any thread may have started one
    children = [pid for thread in threads for pid in thread.read_text().split()]
    return [int(pid) for pid in children if "spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()]


def _running(pid: int) -> bool:
    """Whether there is such a process that has not ended; one that nobody has waited for yet still has its place."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("harm", "before", "told"),
    [
        pytest.param(signal.SIGKILL, None, "the data pipeline failed: ", marks=pytest.mark.slow),  # see above
        pytest.param(
            signal.SIGSTOP,
            functools.partial(_patient_with_the_first, 1, 5.0),
            "no batch came within 5 s",
            marks=pytest.mark.slow,  # a thread that hangs is ended above
        ),
    ],
    ids=["killed", "hangs"],
)
def test_command_ends_when_its_worker_does_not_go_on(tmp_path, harm, before, told):
    options = ("--config.data.reading.workers=1", "--config.steps=100000")
    run = Training(tmp_path / "run", *options, before=before)
    run.wait_for(lambda: reached(tmp_path / "run") >= 5)
    (worker,) = _workers(run)
    os.kill(worker, harm)
    assert run.wait(60) == 1
    last = run.output().splitlines()[-1]
    assert last.startswith("train: ") and told in last and last.endswith("tart the same command again")
    assert saved(tmp_path / "run")[-1] >= 4
    assert not _running(worker)


def test_no_batch_is_taken_ahead():
    """The place in the data must be that of the batches trained on."""
    taken = []
    source = (taken.append(number) or np.full(2, number) for number in range(5))
    batches = Watched(source, seconds=60)
    assert next(batches).tolist() == [0, 0]
    time.sleep(0.05)
    assert taken == [0]
