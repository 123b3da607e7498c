"""The stages beside the warm-up on easy-VQA's images, with tiny networks: through the loop, one interrupted."""

from unittest import mock

import jax
import numpy as np
import pytest

from npedit_jax.training import networks, stages
from tests.training import runs
from tests.training.tiny_networks import easyvqa_config, noise

LOSSES = {
    "base": {"loss"},
    "scorer": {"loss", "right", "entropy"},
    "supervised": {"loss"},
    "npedit": {"loss", "loss/dmd", "loss/scorer", "loss/identity", "loss/fake_score", "unroll"},
}


def build(config):
    """A stage whose networks are full of noise."""
    rng = np.random.default_rng(0)
    make = lambda kind, module, *_: noise(networks.shapes(kind, module), rng)  # noqa: E731
    with mock.patch.object(networks, "initialise", make):
        return stages.build(config)


def assert_trained(stage, end, row, losses):
    """All of the trained networks moved, but for what is frozen, and no update was left out."""
    assert all(np.isfinite(row[name]) for name in losses)
    for name in stage.rules:
        before = jax.tree_util.tree_leaves_with_path(stage.networks[name].params)
        moved = [np.any(a != b) for (_, a), b in zip(before, jax.tree.leaves(end.params[name]), strict=True)]
        assert np.mean(moved) > 0.8 and row[f"gradient_norm/{name}"] > 0 and row[f"skipped/{name}"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage_name", ["base", "scorer", "supervised"])
def test_a_step_trains_the_networks_of_its_stage(tmp_path, stage_name):
    config = easyvqa_config(stage_name)
    stage = build(config)
    end = runs.start(config, stage, tmp_path / "run")
    (row,) = runs.untimed(tmp_path / "run")
    assert_trained(stage, end, row, LOSSES[stage_name])


@pytest.mark.parametrize("separate", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_edit_run_broken_off_and_resumed_equals_the_whole_one_bit_for_bit(tmp_path, separate):
    """Broken off one step past its checkpoint: that step is done again."""
    config = easyvqa_config("npedit", separate_steps=separate)
    stage = build(config)
    end = runs.start(config, stage, tmp_path / "whole")
    runs.break_off(config, stage, tmp_path / "parts", after=3)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]
    again = runs.start(config, stage, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(end))
    rows = runs.untimed(tmp_path / "whole")
    assert rows == runs.untimed(tmp_path / "parts")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and len({row["loss"] for row in rows}) == 4
    assert_trained(stage, end, rows[-1], LOSSES["npedit"])
