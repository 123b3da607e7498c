"""One run at a time in a working directory: a file lock on a disk, a lease that must be renewed on a bucket."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TextIO

import jax
from absl import logging
from etils import epath

from npedit_jax.training.workdirs import LEASE, LOCK, WorkdirUnavailable

LEASE_SECONDS = 60.0


@contextlib.contextmanager
def held(workdir: epath.PathLike) -> Iterator[None]:
    """Holds the directory for this run, process 0 for all of a pod; creates it, and removes it again if left empty.

    A process that is killed, in whichever way, leaves no lock that counts: the system lets go of the file, and a lease
    that is not renewed runs out after LEASE_SECONDS, which the next run waits for.

    Raises:
      WorkdirUnavailable: another run holds the directory, or nothing can be written there.
    """
    if jax.process_index() != 0:
        yield
        return
    workdir = epath.Path(workdir)
    created = not workdir.exists()
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if created:
                stack.callback(_remove_if_empty, workdir)
            stack.enter_context(_lock(workdir))
        except WorkdirUnavailable:
            raise
        except OSError as error:
            raise WorkdirUnavailable(
                f"nothing can be written in {workdir}: {error.strerror or error}; take another --workdir, or mend it"
            ) from error
        yield


@contextlib.contextmanager
def _lock(workdir: epath.Path) -> Iterator[None]:
    if "://" not in os.fspath(workdir):
        try:
            file = _flock(pathlib.Path(os.fspath(workdir)) / LOCK)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        else:
            with file:
                try:
                    yield
                finally:
                    os.unlink(file.name)
            return
    with Lease(workdir / LEASE):
        yield


def _flock(path: pathlib.Path) -> TextIO:
    """Opens and locks the file, which tells who holds it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise WorkdirUnavailable(
                f"{path.parent} is in use by {holder}; stop that run first, or take another --workdir"
            ) from None
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # the run before removed it between the two calls
    file.truncate(0)
    file.write(_self())
    file.flush()
    return file


class Lease:
    """A file renewed by a thread for as long as it is held.

    Clocks of two machines are never compared: a lease counts while somebody is seen to renew it. Buckets offer no
    exclusive creation through this interface, so two runs started within `settle` seconds are told apart by which of
    them wrote last.

    Args:
      path: of the file.
      seconds: after which a lease that nobody renewed has run out.
      settle: seconds in which two writers see each other.
      on_lost: called when another run has taken the lease over; by default the process ends at once, without saving:
        the directory is the other run's.
    """

    def __init__(
        self,
        path: epath.Path,
        seconds: float = LEASE_SECONDS,
        settle: float = 2.0,
        on_lost: Callable[[], None] | None = None,
    ):
        self._path, self._seconds, self._settle = path, seconds, settle
        self._on_lost = on_lost or self._abandon
        self._name = uuid.uuid4().hex
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Takes the lease, waiting for one to run out; raises WorkdirUnavailable where its holder is seen alive."""
        self._await_end()
        self._write(0)
        time.sleep(self._settle)
        if not self._is_mine():
            raise self._in_use()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._released.set()
        self._thread.join()
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _await_end(self) -> None:
        first = self._read()
        if first:
            logging.warning("waiting up to %g s for the lease of %s to run out", self._seconds, _holder(first))
        deadline = time.monotonic() + self._seconds
        while first and time.monotonic() < deadline:
            time.sleep(self._seconds / 60)
            found = self._read()
            if found and found != first:
                raise self._in_use()
            first = found

    def _renew(self) -> None:
        number = 0
        while not self._released.wait(self._seconds / 4):
            number += 1
            try:
                if not self._is_mine():
                    self._on_lost()
                    return
                self._write(number)
            except Exception as error:  # a bucket out of reach for a moment, told by whatever its library raises
                logging.warning("the lease %s was not renewed: %s", self._path, error)

    def _write(self, number: int) -> None:
        self._path.write_text(json.dumps({"lease": self._name, "renewal": number, "holder": _self()}))

    def _read(self) -> str:
        """What the lease says; "" where there is none, or where a killed run left it empty."""
        for _ in range(20):
            try:
                text = self._path.read_text()
            except FileNotFoundError:
                return ""
            if text:
                return text
            time.sleep(0.01)  # it is being written
        return ""

    def _is_mine(self) -> bool:
        return self._name in self._read()

    def _in_use(self) -> WorkdirUnavailable:
        return WorkdirUnavailable(
            f"{self._path.parent} is in use by {_holder(self._read())}; stop that run first, or take another --workdir"
        )

    def _abandon(self) -> None:
        print(f"train: {self._in_use()}", file=sys.stderr, flush=True)
        os._exit(1)


def _holder(text: str) -> str:
    try:
        return str(json.loads(text)["holder"])
    except (ValueError, KeyError, TypeError):
        return "another process"


def _self() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}"


def _remove_if_empty(directory: epath.Path) -> None:
    if directory.exists() and not any(directory.iterdir()):
        directory.rmdir()
