"""What is saved here gives the outputs of the golden runs when the original classes load it."""

import pathlib

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from npedit_jax import weights
from tests.models.torch_parity import FORWARD, relative

PLACEHOLDER = 288
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def saved(kind: str, source: str, directory: pathlib.Path) -> pathlib.Path:
    """A golden checkpoint loaded and saved again, in float32 and in shards."""
    module, params = weights.load(kind, GOLDEN / source, keep_unused=True)
    weights.save(kind, module, params, directory / "saved", max_shard_bytes=100_000)
    return directory / "saved"


def read(letter: str) -> dict[str, torch.Tensor]:
    tensors = safetensors.numpy.load_file(GOLDEN / letter / "golden.safetensors")
    return {name: torch.from_numpy(value) for name, value in tensors.items()}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_denoiser(tmp_path):
    golden = read("A")
    model = diffusers.ZImageTransformer2DModel.from_pretrained(saved("zimage", "A/transformer", tmp_path))
    lengths = golden["a.cap_lens"].tolist()
    captions = [text[:length] for text, length in zip(golden["a.txt"], lengths, strict=True)]
    output = model(list(golden["a.x"]), 1.0 - golden["a.t"], captions, return_dict=False)[0]
    assert relative(torch.stack(output), golden["a.raw_plain"]) <= FORWARD


def test_autoencoder(tmp_path):
    golden = read("B")
    model = diffusers.AutoencoderKL.from_pretrained(saved("autoencoder", "B/vae", tmp_path))
    images, latents = (golden[name].squeeze(2) if golden[name].ndim == 5 else golden[name] for name in ("x", "z_in"))
    assert relative(model.encode(images).latent_dist.mean, golden["mean"].reshape(-1, *latents.shape[1:])) <= FORWARD
    latents = latents / model.config.scaling_factor + model.config.shift_factor
    assert relative(model.decode(latents).sample, golden["dec"].reshape(-1, *images.shape[1:])) <= FORWARD


def test_text_encoder(tmp_path):
    golden = read("C")
    directory = saved("qwen3", "C/text_encoder", tmp_path)
    model, info = transformers.AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    output = model(golden["input_ids"], attention_mask=golden["attention_mask"], output_hidden_states=True)
    real = golden["attention_mask"].bool()
    assert relative(output.hidden_states[-2][real], golden["emb"][real]) <= FORWARD
    assert relative(output.last_hidden_state[real], golden["last_hidden"][real]) <= FORWARD


@pytest.mark.parametrize(
    ("kind", "source", "case"),
    [("internvl", "D/internvl_native", "native"), ("llava_onevision", "D/llava_onevision", "llava1")],
)
def test_scorers(kind, source, case, tmp_path):
    golden = {name.removeprefix(f"{case}."): value for name, value in read("D").items()}
    directory = saved(kind, source, tmp_path)
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.image_token_id == PLACEHOLDER
    mask = golden.get("attention_mask", torch.ones_like(golden["input_ids"]))
    extra = {"image_sizes": golden["image_sizes"]} if "image_sizes" in golden else {}
    logits = model(input_ids=golden["input_ids"], attention_mask=mask, pixel_values=golden["px"], **extra).logits
    real = mask.bool()
    assert relative(np.asarray(logits[real]), golden["logits"][real]) <= FORWARD
