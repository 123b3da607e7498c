"""The meter on a clock of its own: what time goes into, over restarts; profiles; Weights & Biases where asked for."""

import sys
import types

import pytest

from npedit_jax.training import telemetry

WORK = telemetry.Work(samples=8, tokens=800, devices=2, flops=4e12, peak_flops=1e13)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def meter(tmp_path, clock, restored=0):
    return telemetry.Meter(tmp_path, restored, WORK, clock)


def steps(made, clock, count, seconds=2.0, waiting=0.5):
    for _ in range(count):
        with made.data():
            clock.now += waiting
        clock.now += seconds - waiting
        made.count()


def test_figures_are_of_the_steps_alone(tmp_path):
    clock = Clock()
    made = meter(tmp_path, clock)
    steps(made, clock, 4)
    with made.apart():
        clock.now += 12.0  # a checkpoint
    found = made.read()
    assert found["time/step"] == pytest.approx(2.0) and found["time/data"] == pytest.approx(0.5)
    assert found["time/samples_per_second"] == pytest.approx(4.0)
    assert found["time/tokens_per_second"] == pytest.approx(400.0)
    assert found["time/flops_per_device"] == pytest.approx(1e12) and found["time/mfu"] == pytest.approx(0.1)
    assert found["time/goodput"] == pytest.approx(8.0 / 20.0)
    steps(made, clock, 1, seconds=1.0)
    assert made.read()["time/step"] == pytest.approx(1.0)  # since the last reading


def test_goodput_goes_on_over_a_restart(tmp_path):
    """Steps past the checkpoint, and the time in which nothing ran, are lost."""
    clock = Clock()
    log, made = telemetry.MetricsLog(tmp_path, restored_step=0), meter(tmp_path, clock)
    for step in (1, 2, 3):
        steps(made, clock, 1)
        log.write(step, {"loss": 1.0} | made.read())
    log.close()
    clock.now += 100.0
    again = meter(tmp_path, clock, restored=2)
    steps(again, clock, 1)
    assert again.read()["time/goodput"] == pytest.approx(6.0 / 108.0)


def test_what_was_lost_before_the_first_checkpoint_counts(tmp_path):
    clock = Clock()
    log, made = telemetry.MetricsLog(tmp_path, restored_step=0), meter(tmp_path, clock)
    steps(made, clock, 3)
    log.write(3, {"loss": 1.0} | made.read())
    log.close()
    again = meter(tmp_path, clock)
    steps(again, clock, 1)
    assert again.read()["time/goodput"] == pytest.approx(2.0 / 8.0)


def test_compilation_is_no_part_of_a_step(tmp_path):
    clock = Clock()
    made = meter(tmp_path, clock)
    clock.now += 30.0
    made._listen("/jax/core/compile/backend_compile_duration", 30.0)
    made._listen("/jax/another/event", 5.0)
    steps(made, clock, 1)
    found = made.read()
    assert found["time/compile"] == 30.0 and found["time/step"] == pytest.approx(2.0)


def test_compilation_while_saving_counts_once(tmp_path):
    clock = Clock()
    made = meter(tmp_path, clock)
    steps(made, clock, 2)
    with made.apart():
        clock.now += 30.0
        made._listen("/jax/core/compile/backend_compile_duration", 29.0)
    assert made.read()["time/step"] == pytest.approx(2.0)


def test_no_peak_no_utilisation(tmp_path):
    clock = Clock()
    made = telemetry.Meter(tmp_path, 0, WORK._replace(flops=0.0, peak_flops=None), clock)
    steps(made, clock, 1)
    assert not {"time/mfu", "time/flops_per_device"} & made.read().keys()


def test_a_profile_covers_the_chosen_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda path: calls.append(("start", path)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(("stop",)))
    profiler = telemetry.Profiler(tmp_path, (2, 3))
    for step in range(1, 6):
        profiler.before(step)
        profiler.after(step, {})
        calls.append((step,))
    assert calls == [(1,), ("start", str(tmp_path / "profile")), (2,), ("stop",), (3,), (4,), (5,)]
    silent = telemetry.Profiler(tmp_path, ())
    silent.before(1)
    silent.after(1, {})
    silent.close()


def test_weights_and_biases_gets_every_row(tmp_path, monkeypatch):
    told = []
    run = types.SimpleNamespace(log=lambda row, step: told.append((step, row)), finish=lambda: told.append("end"))
    wandb = types.SimpleNamespace(init=lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = telemetry.MetricsLog(tmp_path, restored_step=0, wandb_project="edits")
    log.write(1, {"loss": 2.0})
    log.close()
    begun, *rest = told
    assert begun.pop("id").startswith(f"{tmp_path.name}-") and begun == dict(project="edits", resume="allow")
    assert rest == [(1, {"loss": 2.0}), "end"]


def test_a_run_outlives_whoever_reads_its_progress(monkeypatch):
    class Gone:
        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    with telemetry.progress(3, 0, "base") as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()
        assert bar.n == 3
