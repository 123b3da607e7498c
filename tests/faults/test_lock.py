"""One run at a time in a working directory; one that was killed holds nothing."""

import contextlib
import signal
import threading
import time

import pytest
from etils import epath

from npedit_jax.training import workdir_lock, workdirs
from npedit_jax.training.workdir_lock import Lease
from tests.faults import tiny_config
from tests.faults.command import CONTEXT, Training


def _hold(workdir, ready):
    with workdir_lock.held(workdir):
        ready.set()
        time.sleep(600)


def test_second_run_is_refused_and_told_who_holds_it(tmp_path):
    workdir = tmp_path / "run"
    with workdir_lock.held(workdir):
        workdirs.open_run(workdir, tiny_config.get_config())
        before = sorted(path.name for path in workdir.iterdir())
        run = Training(workdir)
        assert run.wait() == 1
        assert sorted(path.name for path in workdir.iterdir()) == before
    (line,) = run.output().splitlines()
    assert line.startswith("train: ") and "run is in use by process " in line and " on " in line
    with workdir_lock.held(workdir):
        pass


def test_killed_holder_does_not_block_the_next(tmp_path):
    ready = CONTEXT.Event()
    holder = CONTEXT.Process(target=_hold, args=(tmp_path / "run", ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(workdirs.WorkdirError, match=f"in use by process {holder.pid} on"):
        workdir_lock.held(tmp_path / "run").__enter__()
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    with workdir_lock.held(tmp_path / "run"):
        assert (tmp_path / "run" / workdirs.LOCK).exists()


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    with workdir_lock.held(tmp_path / "new"):
        pass
    with pytest.raises(KeyError), workdir_lock.held(tmp_path / "new"):
        raise KeyError
    (tmp_path / "old").mkdir()
    with workdir_lock.held(tmp_path / "old"):
        pass
    assert not (tmp_path / "new").exists() and not any((tmp_path / "old").iterdir())


def _lease(path, **options):
    return Lease(path, **{"seconds": 0.8, "settle": 0.05, **options})


def test_lease_is_refused_while_it_is_renewed(tmp_path):
    patient = dict(seconds=5.0)  # the renewing thread may have to wait for its turn
    with _lease(tmp_path / "lease", **patient), pytest.raises(workdirs.WorkdirError, match="in use by process"):
        _lease(tmp_path / "lease", **patient).__enter__()
    assert not (tmp_path / "lease").exists()


def test_lease_that_nobody_renews_runs_out(tmp_path):
    lost = _lease(tmp_path / "lease")
    lost._write(7)  # as a killed run leaves it
    started = time.monotonic()
    with _lease(tmp_path / "lease"):
        assert time.monotonic() - started > 0.8


def test_lease_outlives_any_error_of_a_renewal(tmp_path):
    class Hindered(Lease):
        def _write(self, number):
            if number == 1:
                raise RuntimeError("as a bucket's library may raise")
            super()._write(number)

    with Hindered(tmp_path / "lease", seconds=0.8, settle=0.05) as lease:
        deadline = time.monotonic() + 30
        while '"renewal": 2' not in lease._read():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_of_two_that_start_together_the_last_writer_holds_it(tmp_path):
    class Overtaken(Lease):
        def _write(self, number):
            super()._write(number)
            _lease(tmp_path / "lease")._write(0)

    with pytest.raises(workdirs.WorkdirError, match="in use by"):
        Overtaken(tmp_path / "lease", seconds=0.8, settle=0.05).__enter__()


def test_holder_learns_that_its_lease_is_gone(tmp_path):
    lost = threading.Event()
    with _lease(tmp_path / "lease", on_lost=lost.set):
        _lease(tmp_path / "lease")._write(0)
        assert lost.wait(5)
    assert (tmp_path / "lease").exists()  # the other run's


def test_disk_without_locks_gets_a_lease(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir_lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(workdir_lock.Lease.__init__, "__defaults__", (0.8, 0.05, None))
    with workdir_lock.held(tmp_path / "run"):
        assert (tmp_path / "run" / workdirs.LEASE).exists()


def test_bucket_gets_a_lease(monkeypatch):
    taken = []
    monkeypatch.setattr(workdir_lock, "Lease", lambda path: contextlib.nullcontext(taken.append(str(path))))
    with workdir_lock._lock(epath.Path("gs://bucket/run")):
        assert taken == [f"gs://bucket/run/{workdirs.LEASE}"]
