"""State and frozen networks in the host's memory between programs: the same training."""

import jax
import numpy as np
import pytest

from npedit_jax.training import loop, previews, stages, workdirs
from tests.training.tiny_networks import lora_config as make_config


def kinds(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def run(folder, offload: tuple[str, ...], expected: str):
    """The final state; at every step optimizer and base lie where expected, and a picture is drawn from them."""
    config = make_config()
    with config.unlocked():
        config.offload = offload
    config.log.preview_every = 1
    workdirs.open_run(folder, config)
    draw = previews.Previews(config, folder)

    def look(stage, state, frozen, step):
        assert kinds(state.optimizer) == kinds(frozen["base"]) == {expected}
        assert kinds(stage.networks["base"].params) == {expected}  # no second copy stays on the devices
        assert kinds(state.params) == {"device"}
        draw(stage, state, frozen, step)

    return loop.run(config, stages.build(config), folder, preview=look)


def test_offloaded_training_is_the_same(tmp_path):
    state = run(tmp_path / "off", ("optimizer", "base", "autoencoder"), "pinned_host")
    expected = run(tmp_path / "on", (), "device")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))


def test_unknown_name_is_told():
    config = make_config()
    with config.unlocked():
        config.offload = ("student",)
    with pytest.raises(ValueError, match=r"cannot offload \['student'\].*autoencoder"):
        stages.build(config)
