"""Updates left out because of numbers that are not finite: a run with too many of them ends by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.training import loop, stages, telemetry, workdirs
from npedit_jax.training import state as states
from npedit_jax.training.faults import RunFault
from npedit_jax.training.skip_limit import SkipLimit
from tests.faults.command import saved
from tests.training.tiny import autoencoder_config


def _config():
    config = autoencoder_config(steps=16)
    config.guard.skipped_share, config.guard.window = 0.2, 10
    return config


@functools.cache
def _update():
    """Gradients that are one number everywhere: one program for all runs."""
    rule = stages.rules(_config())["autoencoder"]

    def update(state, value):
        gradients = jax.tree.map(lambda x: jnp.full_like(x, value), state.params["autoencoder"])
        state, metrics = states.apply_gradients(state, "autoencoder", gradients, rule)
        return states.finish_step(state, 0.9), metrics | {"loss": value}

    return jax.jit(update)


def _stage_with_bad_steps(bad):
    """The run's own state and rules, with gradients of ones, or of NaN on the steps where `bad` holds."""

    def step(state, frozen, batch, rng):
        wrong = bad(int(jax.device_get(state.step)) + 1)
        return _update()(state, jax.device_put(np.float32(np.nan if wrong else 1.0)))

    return dataclasses.replace(stages.build(_config()), step=step)


def test_run_ends_by_itself_above_the_share_with_a_checkpoint_from_before(tmp_path):
    config = _config()
    workdirs.open_run(tmp_path / "run", config)
    with pytest.raises(RunFault, match="step 11: 3 updates of autoencoder were left out within 10 steps.*at most 2"):
        loop.run(config, _stage_with_bad_steps(lambda step: step > 8), tmp_path / "run")
    assert saved(tmp_path / "run") == [8, 10]
    rows = telemetry.read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == 11 and rows[-1]["loss"] is None and rows[-1]["skipped/autoencoder"] == 3
    # With the cause gone it goes on from there.
    final = loop.run(config, _stage_with_bad_steps(lambda step: step < 0), tmp_path / "run")
    assert int(final.step) == 16 and int(final.skipped["autoencoder"]) == 2


def test_no_checkpoint_is_from_after_the_limit_although_nothing_is_logged_there(tmp_path):
    config = _config()
    config.log.every, config.checkpoint.every = 8, 3
    config.guard.skipped_share, config.guard.window = 0.25, 4
    workdirs.open_run(tmp_path / "run", config)
    with pytest.raises(RunFault, match="step 12: 4 updates of autoencoder"):
        loop.run(config, _stage_with_bad_steps(lambda step: step > 8), tmp_path / "run")
    assert max(saved(tmp_path / "run")) == 9


def test_run_within_the_share_goes_on(tmp_path):
    config = _config()
    workdirs.open_run(tmp_path / "run", config)
    final = loop.run(config, _stage_with_bad_steps(lambda step: step % 6 == 0), tmp_path / "run")
    assert int(final.skipped["autoencoder"]) == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(final.params))


def test_limit_counts_the_updates_of_a_window_for_each_network():
    limit = SkipLimit(0.1, 100, {"student": 1, "fake_score": 5}, 0, {"student": 7, "fake_score": 0})
    limit.check(50, {"skipped/student": 17, "skipped/fake_score": 50})
    limit.check(150, {"skipped/student": 27, "skipped/fake_score": 100})
    with pytest.raises(RunFault, match="step 200: 11 updates of student .*at most 10"):
        limit.check(200, {"skipped/student": 38, "skipped/fake_score": 100})
    with pytest.raises(RunFault, match="51 updates of fake_score .*at most 50"):
        limit.check(249, {"skipped/student": 27, "skipped/fake_score": 151})


def test_readings_further_apart_than_the_window_count_all_steps_between():
    limit = SkipLimit(0.1, 100, {"student": 1}, 0, {"student": 0})
    limit.check(500, {"skipped/student": 50})
    with pytest.raises(RunFault, match="step 1000: 51 updates of student .*within 500 steps.*at most 50"):
        limit.check(1000, {"skipped/student": 101})


def test_network_without_updates_is_not_looked_at():
    SkipLimit(0.1, 100, {"student": 1, "fake_score": 0}, 0, {"student": 0, "fake_score": 0}).check(
        1, {"skipped/student": 0}
    )
