"""A run end to end on a small autoencoder: its files, exact resumption, and the refusal to mix two runs."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from npedit_jax.training import loop, previews, stages, telemetry, workdirs
from tests.training import runs
from tests.training.tiny import autoencoder_config


def _run(workdir, stop_at: int | None = None):
    config = autoencoder_config()
    stage = stages.build(config)
    if stop_at is None:
        return runs.start(config, stage, workdir, preview=previews.Previews(config, workdir))
    return runs.break_off(config, stage, workdir, stop_at)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its directory and its final state."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, _run(workdir)


def test_files_of_a_run(whole):
    workdir, _ = whole
    assert json.loads((workdir / "config.json").read_text())["steps"] == 6
    assert [row["step"] for row in runs.untimed(workdir)] == [1, 2, 3, 4, 5, 6]
    assert next(iter(runs.untimed(workdir)[0])) == "step"
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) == ["4", "6"]
    assert any((workdir / "tensorboard").iterdir())


def test_hidden_transfer_in_a_step_is_an_error(tmp_path):
    config = autoencoder_config()
    workdirs.open_run(tmp_path, config)
    add = jax.jit(lambda x: x + 1)
    careless = lambda state, frozen, batch, rng: (state, {"loss": add(np.ones(3))})  # noqa: E731
    stage = dataclasses.replace(stages.build(config), step=careless)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop.run(config, stage, tmp_path)


def test_time_of_a_step_is_not_counted_as_that_of_saving(tmp_path, monkeypatch):
    """A step goes on after it was begun: what is left of it would else be waited for while saving."""
    config = autoencoder_config()
    workdirs.open_run(tmp_path, config)
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 20_000, lambda _, x: x + jax.numpy.sin(x), x).sum())
    x, none, begun, ready = jax.numpy.ones(5000), jax.numpy.zeros(()), [], []

    def step(state, frozen, batch, rng):
        begun.append(long(x))
        return state, {"loss": begun[-1], "skipped/autoencoder": none}

    @contextlib.contextmanager
    def apart(meter):
        ready.append(begun[-1].is_ready())
        yield

    monkeypatch.setattr(telemetry.Meter, "apart", apart)
    loop.run(config, dataclasses.replace(stages.build(config), step=step), tmp_path)
    saved = [number for number in range(1, 7) if number % config.checkpoint.every == 0 or number == 6]
    assert len(ready) == 6 and all(ready[number - 1] for number in saved)
    assert not all(ready), "the step is too short for this test"


def test_training_lowers_the_loss(whole):
    rows = runs.untimed(whole[0])
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, tmp_path):
    """Stopped after step 3, one step past the checkpoint: that step is done again."""
    workdir, state = whole
    _run(tmp_path / "run", stop_at=3)
    resumed = _run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(state))
    assert runs.untimed(tmp_path / "run") == runs.untimed(workdir)


def test_a_resumed_run_holds_no_initial_state_beside_the_one_it_reads(tmp_path, monkeypatch):
    _run(tmp_path, stop_at=3)
    config = autoencoder_config()
    stage = stages.build(config)
    initial = jax.tree.leaves(stage.networks["autoencoder"].params)
    monkeypatch.setattr(stages.Stage, "start", lambda stage: pytest.fail("another state was made"))
    assert int(loop.run(config, stage, tmp_path).step) == 6
    assert initial and all(array.is_deleted() for array in initial)


def test_finished_run_has_nothing_left_to_do(whole):
    workdir, state = whole
    before = (workdir / "metrics.jsonl").read_text()
    again = loop.run(autoencoder_config(), stages.build(autoencoder_config()), workdir)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))
    assert (workdir / "metrics.jsonl").read_text() == before


def test_workdir_of_another_experiment_is_refused_with_the_fields(tmp_path):
    workdirs.open_run(tmp_path / "run", autoencoder_config())
    other = autoencoder_config(steps=7)
    other.batch_size = 4
    with pytest.raises(workdirs.WorkdirError, match="batch_size is 2 there and 4 here; steps is 6 there and 7 here"):
        workdirs.open_run(tmp_path / "run", other)


def test_fields_that_do_not_change_the_result_may_differ(tmp_path):
    workdirs.open_run(tmp_path / "run", autoencoder_config())
    other = autoencoder_config()
    other.checkpoint.every = 3
    other.networks.autoencoder.options.remat = "full"
    workdirs.open_run(tmp_path / "run", other)
    assert workdirs.read_config(tmp_path / "run").checkpoint.every == 3
    with other.unlocked():
        other.networks.autoencoder.options.slice_batch = True
    with pytest.raises(workdirs.WorkdirError, match="slice_batch"):
        workdirs.open_run(tmp_path / "run", other)


def test_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(workdirs.WorkdirError, match="holds no run"):
        workdirs.open_run(tmp_path, autoencoder_config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(workdirs.WorkdirError, match="is no run"):
        workdirs.read_config(epath.Path(tmp_path))
    (tmp_path / "thesis.tex").rename(tmp_path / ".config.json.tmp")  # as a kill leaves it, before the run began
    assert workdirs.check(tmp_path, autoencoder_config()) == []


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    log = telemetry.MetricsLog(tmp_path, restored_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float("nan") if step == 2 else 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a crash
    telemetry.MetricsLog(tmp_path, restored_step=2).close()
    assert telemetry.read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]
