"""Every config file: it loads, names a stage, and its networks have shapes that fit one another."""

import importlib.util
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from npedit_jax.training import networks

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.py"))


def _load(path: pathlib.Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--config configs/{path.relative_to(CONFIGS)}" in module.__doc__, "the docstring gives the launch command"
    return module.get_config()


def _shipped(spec: ConfigDict) -> bool:
    return not spec.directory or (networks.resolve(spec.directory) / "config.json").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_trains_networks_that_it_has(path):
    config = _load(path)
    assert set(config.optimizer) <= set(config.networks)
    assert config.batch_size % config.cpu_devices == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_networks_of_a_config_fit_one_another(path):
    config = _load(path)
    modules = {name: networks.module_of(spec) for name, spec in config.networks.items() if _shipped(spec)}
    for name, module in modules.items():
        assert jax.tree.leaves(networks.shapes(config.networks[name].kind, module)), name
    denoisers = [module for name, module in modules.items() if config.networks[name].kind == "zimage"]
    for denoiser in denoisers:
        assert denoiser.channels == modules["autoencoder"].latent_channels
        if "text_encoder" in modules:
            assert denoiser.text_width == modules["text_encoder"].decoder.width
