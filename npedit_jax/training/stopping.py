"""A request to stop (SIGTERM, a hangup, Ctrl-C): the run finishes its step, saves, and ends."""

import signal
import threading
from types import FrameType
from typing import Any

import jax

from npedit_jax.training import hosts

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(Exception):
    """A run was asked to stop, and has saved; `signal` is what asked."""

    def __init__(self, step: int, number: int):
        super().__init__(f"{signal.Signals(number).name} received: saved at step {step}; start again to go on")
        self.signal = number


class StopRequest:
    """Notices the signals from `listen` on, as a context manager that gives the earlier handlers back.

    Before `listen` the signals do what they do everywhere, end the process at once: right for a run that has not made a
    step yet and has nothing to save, since a handler waits for the end of a compilation. SIGTERM may come again and
    changes nothing; a second Ctrl-C interrupts at once. A hangup that is ignored (nohup) stays so.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def asked_for(self, step: int) -> bool:
        """Whether the run ends after this step; to be asked after every step, from the first of which on it listens.

        Of several processes the one that was told tells the others, and all end after the same step.
        """
        if jax.process_count() == 1:
            self.listen()
        elif hosts.stop_at(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def listen(self) -> None:
        """Begins to notice the signals; a second call changes nothing. Only the main thread can."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
