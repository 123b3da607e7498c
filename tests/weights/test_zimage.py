"""The denoiser's config and weights in diffusers' layout, there and back."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from npedit_jax import weights
from npedit_jax.weights import zimage

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "A"


def test_config_and_weights_round_trip(tmp_path):
    module, params = weights.load("zimage", GOLDEN / "transformer")
    weights.save("zimage", module, params, tmp_path / "saved", dtype="float16")
    again, params_again = weights.load("zimage", tmp_path / "saved")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    original, saved = (
        safetensors.numpy.load_file(directory / "diffusion_pytorch_model.safetensors")
        for directory in (GOLDEN / "transformer", tmp_path / "saved")
    )
    assert original.keys() == saved.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor)


def test_config_keeps_diffusers_keys_and_only_options_that_differ():
    config = json.loads((GOLDEN / "transformer" / "config.json").read_text())
    described = zimage.describe(zimage.build(config))
    assert described == {key: value for key, value in config.items() if key != "_diffusers_version"}
    extra = {"pad_multiple": 1, "pad_tokens": "mask", "prediction": "sample", "position_embedding": "sinusoidal"}
    module = zimage.build(config | {"npedit": extra, "all_patch_size": [8]}, remat="full", dtype=jnp.bfloat16)
    assert (module.patch_size, module.prediction, module.remat, module.dtype) == (8, "sample", "full", jnp.bfloat16)
    assert json.loads(json.dumps(zimage.describe(module)))["npedit"] == extra
    assert zimage.build(zimage.describe(module), remat="full", dtype=jnp.bfloat16) == module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim"),
        ({"qk_norm": False}, "qk_norm"),
        ({"all_f_patch_size": [2]}, "all_f_patch_size"),
        ({"all_patch_size": [2, 4]}, "exactly one size"),
        ({"npedit": {"padding": 3}}, "unknown .npedit. options"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        zimage.build(change)
