"""The wait for a batch, which has an end: a data pipeline that hangs or dies is told, never waited for in silence."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

from npedit_jax.training.faults import DataStall, RunFault


class Watched:
    """Batches taken in a thread of their own, so that waiting for one has an end.

    Args:
      batches: what is iterated; all else that it has (`get_state`, `set_state`) is reached through this.
      seconds: how long one batch may take.
    """

    def __init__(self, batches: Any, seconds: float):
        self._batches, self._seconds = batches, seconds
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="batches", daemon=True).start()

    def _serve(self) -> None:
        while self._wanted.get():
            try:
                self._made.put((next(self._batches), None))
            except BaseException as error:  # StopIteration as well: it is raised again where the batch is waited for
                self._made.put((None, error))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch.

        Raises:
          DataStall: it took longer than it may.
          RunFault: a worker process is gone.
        """
        self._wanted.put(True)
        try:
            batch, error = self._made.get(timeout=self._seconds)
        except queue.Empty:
            raise DataStall(
                f"no batch came within {self._seconds:g} s (config.guard.data_seconds): a worker or the storage "
                "hangs. The last checkpoint is whole: start the same command again"
            ) from None
        if isinstance(error, RuntimeError):  # how Grain tells of a worker that was killed
            raise RunFault(f"the data pipeline failed: {error}. Start the same command again") from error
        if error is not None:
            raise error
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def close(self) -> None:
        """Lets the thread end."""
        self._wanted.put(False)
