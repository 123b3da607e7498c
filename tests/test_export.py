"""Networks taken out of a run: their weights, the latents' normalisation, and refusals."""

import jax
import numpy as np
import pytest

from npedit_jax import export, weights
from npedit_jax.data import easyvqa
from npedit_jax.pixels import to_pixels
from npedit_jax.training import loop, stages, workdirs
from tests.training.tiny import autoencoder_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and its final state."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    config = autoencoder_config(steps=2)
    workdirs.open_run(workdir, config)
    return workdir, loop.run(config, stages.build(config), workdir)


@pytest.mark.parametrize("raw", [False, True])
def test_exported_weights_are_those_of_the_run(run, tmp_path, raw):
    workdir, state = run
    assert export.export(workdir, tmp_path, raw=raw, dtype=None) == [str(tmp_path / "vae")]
    _, params = weights.load("autoencoder", tmp_path / "vae")
    expected = (state.params if raw else state.ema)["autoencoder"]
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(expected))


def test_latents_of_an_exported_autoencoder_have_mean_0_and_deviation_1(run, tmp_path):
    export.export(run[0], tmp_path, raw=False, dtype=None)
    module, params = weights.load("autoencoder", tmp_path / "vae")
    pixels = to_pixels(easyvqa.load("train").images[:512])
    latents = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))(pixels)
    assert abs(float(latents.mean())) < 2e-2
    assert abs(float(latents.std()) - 1.0) < 2e-2


def test_existing_folders_are_left_alone(run, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError):
        export.export(run[0], tmp_path, raw=False, dtype=None)
    assert (tmp_path / "vae" / "config.json").read_text() == "mine"


def test_directory_without_a_checkpoint_is_named(tmp_path):
    workdirs.open_run(tmp_path / "run", autoencoder_config())
    with pytest.raises(workdirs.WorkdirError, match="has no checkpoint yet"):
        export.export(tmp_path / "run", tmp_path / "out", raw=False, dtype=None)
    with pytest.raises(workdirs.WorkdirError, match="is no run"):
        export.export(tmp_path, tmp_path / "out", raw=False, dtype=None)
