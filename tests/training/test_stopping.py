"""A request to stop: what is noticed, from when on, and that the handlers from before come back."""

import os
import signal

import pytest

from npedit_jax.training.stopping import StopRequest


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked_for(1)
        send(number)
        send(signal.SIGTERM)  # a second one changes nothing
        assert stop.asked_for(2) and stop.signal == number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        stop.listen()
        send(signal.SIGINT)
        send(signal.SIGINT)


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.listen()
            send(signal.SIGHUP)
            assert not stop.asked_for(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_it_listens_signals_do_what_they_did():
    noticed = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noticed.append(number))
    try:
        with StopRequest() as stop:
            send(signal.SIGTERM)
            assert noticed == [signal.SIGTERM] and stop.signal is None
    finally:
        signal.signal(signal.SIGTERM, before)
