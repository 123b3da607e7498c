"""State and frozen networks in the host's memory between programs: the same training."""

import jax
import numpy as np
import pytest

from npedit_jax.training import loop, previews, stages, workdirs
from tests.training.test_adapted import config as make_config


def run(folder, offload: tuple[str, ...]):
    config = make_config()
    with config.unlocked():
        config.offload = offload
    workdirs.open_run(folder, config)
    stage = stages.build(config)
    kinds = {
        "optimizer": {x.sharding.memory_kind for x in jax.tree.leaves(stage.start().optimizer)},
        "base": {x.sharding.memory_kind for x in jax.tree.leaves(stage.frozen()["base"])},
    }
    return kinds, loop.run(config, stages.build(config), folder, preview=previews.Previews(config, folder))


def test_offloaded_training_is_the_same(tmp_path):
    kinds, state = run(tmp_path / "off", ("optimizer", "base", "autoencoder"))
    assert kinds == {"optimizer": {"pinned_host"}, "base": {"pinned_host"}}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer)} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
    expected_kinds, expected = run(tmp_path / "on", ())
    assert expected_kinds == {"optimizer": {"device"}, "base": {"device"}}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))


def test_unknown_name_is_told():
    config = make_config()
    with config.unlocked():
        config.offload = ("student",)
    with pytest.raises(ValueError, match=r"cannot offload \['student'\].*autoencoder"):
        stages.build(config)
