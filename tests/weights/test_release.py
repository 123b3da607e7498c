"""The student as the PyTorch release of NP-Edit keeps it."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import ZImageTransformer2DModel

from npedit_jax import weights
from npedit_jax.weights import release

STUDENT = pathlib.Path(__file__).parents[1] / "golden" / "G" / "student" / "transformer"


class ReleaseDenoiser(torch.nn.Module):
    """What the release's module has parameters in: the transformer as an attribute, and nothing else."""

    def __init__(self):
        super().__init__()
        self.transformer = ZImageTransformer2DModel.from_config(ZImageTransformer2DModel.load_config(STUDENT))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_release_loads_both_files_strictly(tmp_path, dtype):
    module, params = weights.load("zimage", STUDENT)
    file = tmp_path / "new" / "student.safetensors"
    release.save_release(module, params, file, dtype)
    release.pickle_release(file, file.with_suffix(".pt"))
    assert sorted(path.name for path in file.parent.iterdir()) == ["student.pt", "student.safetensors"]
    original = safetensors.numpy.load_file(STUDENT / "diffusion_pytorch_model.safetensors")
    for state in (safetensors.torch.load_file(file), torch.load(file.with_suffix(".pt"), weights_only=True)):
        denoiser = ReleaseDenoiser()
        denoiser.load_state_dict(state, strict=True)
        assert {value.dtype for value in state.values()} == {getattr(torch, dtype)}
        for name, value in denoiser.transformer.state_dict().items():
            expected = torch.from_numpy(original[name].astype(np.float32)).to(getattr(torch, dtype)).float()
            torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_names_are_those_of_the_release(tmp_path):
    module, params = weights.load("zimage", STUDENT)
    release.save_release(module, params, tmp_path / "student.safetensors")
    trained = json.loads((STUDENT.parents[1] / "param_names.json").read_text())
    names = [*trained, "x_pad_token", "cap_pad_token"]  # which the release keeps frozen
    saved = safetensors.numpy.load_file(tmp_path / "student.safetensors")
    assert sorted(saved) == sorted(f"transformer.{name}" for name in names)


def test_options_that_the_release_lacks_and_existing_files_are_refused(tmp_path):
    module, params = weights.load("zimage", STUDENT)
    file = tmp_path / "student.safetensors"
    small = module.clone(prediction="sample", pad_multiple=16)
    with pytest.raises(ValueError, match="has no pad_multiple and no prediction"):
        release.save_release(small, params, file)
    assert not file.exists()
    release.save_release(module.clone(pad_tokens="mask"), params, file)
    with pytest.raises(FileExistsError, match="is there already"):
        release.save_release(module, params, file)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    module, params = weights.load("zimage", STUDENT)
    monkeypatch.setattr(release, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        release.save_release(module, params, tmp_path / "student.safetensors")
    assert not list(tmp_path.iterdir())
