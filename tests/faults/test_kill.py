"""A run that is killed, asked to stop, or loses checkpoints, and is started again, ends like one that never was."""

import contextlib
import functools
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from tests.faults.command import Training, outcome, reached, saved

EVERY = 4  # steps between two checkpoints of the config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run comes to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert Training(workdir).wait() == 0
    return outcome(workdir)


def _check_equal(workdir, whole):
    rows, state = outcome(workdir)
    assert rows == whole[0]
    jax.tree.map(np.testing.assert_array_equal, state, whole[1])


def _kill(workdir, condition) -> None:
    run = Training(workdir)
    run.wait_for(condition)
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    # The one checkpoint that was being written is all that can be missing.
    newest = max(saved(workdir), default=0)
    assert reached(workdir) - newest < 2 * EVERY


def _writing(workdir):
    return any((workdir / "checkpoints").glob("*tmp*"))


def test_killed_while_stepping_and_while_saving_and_the_newest_checkpoint_damaged(whole, tmp_path):
    workdir = tmp_path / "run"
    _kill(workdir, lambda: reached(workdir) >= 6)
    _kill(workdir, lambda: reached(workdir) >= 10 and len(saved(workdir)) > 1 and _writing(workdir))
    newest = saved(workdir)[-1]
    for file in (workdir / "checkpoints" / str(newest) / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run = Training(workdir)
    assert run.wait() == 0
    assert f"checkpoint of step {newest} is damaged and passed over" in run.output()
    assert (workdir / "damaged" / str(newest)).exists() and not _writing(workdir)
    _check_equal(workdir, whole)


@pytest.mark.slow
def test_checkpoints_removed_while_one_is_written(whole, tmp_path):
    """It is told, or they are begun anew, as the moment has it; never is the end another one."""
    workdir = tmp_path / "run"
    run = Training(workdir)
    run.wait_for(lambda: reached(workdir) >= 6 and _writing(workdir))
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    if run.wait() != 0:
        # A thread of Orbax may have its say after that.
        assert any(line.startswith("train: ") for line in run.output().splitlines())
        assert Training(workdir).wait() == 0
    _check_equal(workdir, whole)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    """At random moments, every other time inside the writing of a checkpoint."""
    steps = "--config.steps=400"
    assert Training(tmp_path / "whole", steps).wait(600) == 0
    workdir, rng, inside, lost = tmp_path / "run", random.Random(0), 0, []
    for number in range(50):
        run = Training(workdir, steps)
        start = max(saved(workdir), default=0)
        aim = start + rng.randint(1, 12)
        if number % 2:
            run.wait_for(lambda aim=aim: reached(workdir) >= aim and _writing(workdir))
        else:
            run.wait_for(lambda aim=aim: reached(workdir) >= aim)
            time.sleep(rng.uniform(0.0, 0.05))
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        inside += _writing(workdir)
        lost.append(reached(workdir) - max(saved(workdir), default=0))
        assert lost[-1] < 2 * EVERY
    print(f"killed {len(lost)} times, {inside} inside a write; {sum(lost)} steps redone, at most {max(lost)} at once")
    assert inside >= 20
    assert Training(workdir, steps).wait(600) == 0
    _check_equal(workdir, outcome(tmp_path / "whole"))


def test_sigterm_saves_and_others_do_no_harm(whole, tmp_path):
    workdir = tmp_path / "run"
    run = Training(workdir)
    run.wait_for(lambda: reached(workdir) >= 6)
    started = time.monotonic()
    while run.process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            run.signal(signal.SIGTERM)
        time.sleep(0.005)
    newest = saved(workdir)[-1]
    # Once all is written and the handler gone, one more ends the process in the usual way.
    if run.wait() != -signal.SIGTERM:
        assert run.wait() == 128 + signal.SIGTERM
        assert f"train: SIGTERM received: saved at step {newest}" in run.output()
    assert time.monotonic() - started < 30
    assert newest >= 6 and newest == reached(workdir) and not _writing(workdir)
    assert Training(workdir).wait() == 0
    _check_equal(workdir, whole)


def test_a_hangup_saves_unless_it_is_ignored(tmp_path):
    steps = "--config.steps=1000000"
    run = Training(tmp_path / "run", steps)
    run.wait_for(lambda: reached(tmp_path / "run") >= 2)
    run.signal(signal.SIGHUP)
    assert run.wait() == 128 + signal.SIGHUP and saved(tmp_path / "run")[-1] == reached(tmp_path / "run")
    ignores = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    run = Training(tmp_path / "again", steps, before=ignores)
    run.wait_for(lambda: reached(tmp_path / "again") >= 2)
    run.signal(signal.SIGHUP)
    time.sleep(0.5)
    run.signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM


def _forget_the_cache_of_the_tests():
    jax.config.update("jax_compilation_cache_dir", None)  # all else of its settings stays: every program is kept


def test_a_restart_finds_its_programs_compiled(tmp_path):
    workdir, found = tmp_path / "run", []
    for _ in range(2):
        aim = reached(workdir) + 2
        run = Training(workdir, "--config.steps=1000000", before=_forget_the_cache_of_the_tests)
        run.wait_for(lambda aim=aim: reached(workdir) >= aim)
        run.signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
        found.append({path.name for path in (workdir / "compiled").glob("*-cache")})
    assert len(found[0]) > 3 and found[1] <= found[0]


def test_sigterm_before_the_first_step_ends_at_once(tmp_path):
    run = Training(tmp_path / "run")
    run.wait_for(lambda: (tmp_path / "run" / "config.json").exists())
    run.signal(signal.SIGTERM)
    assert run.wait(10) == -signal.SIGTERM
    assert not saved(tmp_path / "run")


@pytest.mark.slow
def test_sigterm_at_the_quick_start_size(tmp_path):
    """Networks, optimizer and batch of the base model: as large as the editor's."""
    workdir = tmp_path / "run"
    run = Training(workdir, "--config=configs/easyvqa/base.py", "--config.log.preview_every=1")
    run.wait_for(lambda: reached(workdir) >= 2, 600)
    started = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    seconds = time.monotonic() - started
    print(f"saved and ended {seconds:.1f} s after SIGTERM")
    assert seconds < 30 and saved(workdir)[-1] == reached(workdir)
