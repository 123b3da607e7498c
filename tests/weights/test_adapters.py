"""Adapters under the original's names: they fit the original's modules, and come back from their file."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from npedit_jax import weights
from npedit_jax.models import lora
from npedit_jax.weights import adapters
from tests.weights.test_weights import read_tensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "A" / "transformer"
ALPHA = 6.0
PATTERNS = ("*/attention/*", "layers/mlp/*", "patch_embedding")


@functools.cache
def parts():
    module, params = weights.load("zimage", GOLDEN)
    fresh = lora.create(jax.random.key(0), params, rank=2, patterns=PATTERNS)
    return module, params, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


def test_pairs_added_to_the_originals_modules_are_the_merged_weights(tmp_path):
    module, params, pairs = parts()
    tensors = adapters.to_peft("zimage", module, pairs)
    theirs = ZImageTransformer2DModel.from_pretrained(GOLDEN)
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    assert 2 * len(layers) == len(tensors)
    for name in layers:
        linear = theirs.get_submodule(name.removeprefix("base_model.model."))
        down, up = (torch.tensor(tensors[f"{name}.lora_{part}.weight"]) for part in "AB")
        with torch.no_grad():
            linear.weight += ALPHA / down.shape[0] * up @ down  # what PEFT does
    weights.save("zimage", module, lora.merge(params, pairs, ALPHA), tmp_path / "merged")
    ours = read_tensors(tmp_path / "merged")
    assert ours.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours[name], value.float().numpy(), atol=1e-5)


def test_adapters_come_back_for_another_alpha(tmp_path):
    module, params, pairs = parts()
    adapters.save(tmp_path / "saved", "zimage", module, pairs, ALPHA)
    with pytest.raises(FileExistsError):
        adapters.save(tmp_path / "saved", "zimage", module, pairs, ALPHA)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    like = jax.tree.map(jnp.zeros_like, pairs)
    again = adapters.load(tmp_path / "saved", "zimage", module, like=like, alpha=ALPHA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, pairs)
    other = adapters.load(tmp_path / "saved", "zimage", module, like=like, alpha=1.0)
    same = (lora.merge(params, tree, alpha) for tree, alpha in ((pairs, ALPHA), (other, 1.0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *same)


def test_adapters_that_peft_wrote_are_read(tmp_path):
    peft = pytest.importorskip("peft", reason="an optional writer; its layout is tested without")
    module, params, pairs = parts()
    names = adapters.to_peft("zimage", module, pairs)
    layers = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names})
    settings = peft.LoraConfig(r=2, lora_alpha=ALPHA, target_modules=layers)
    theirs = peft.get_peft_model(ZImageTransformer2DModel.from_pretrained(GOLDEN), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    found = adapters.load(tmp_path, "zimage", module, like=jax.tree.map(jnp.zeros_like, pairs), alpha=ALPHA)
    weights.save("zimage", module, lora.merge(params, found, ALPHA), tmp_path / "merged")
    ours = read_tensors(tmp_path / "merged")
    for name, value in theirs.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(ours[name], value.float().numpy(), atol=1e-5, err_msg=name)


def test_adapters_of_other_targets_are_refused_by_name(tmp_path):
    module, params, pairs = parts()
    adapters.save(tmp_path, "zimage", module, pairs, ALPHA)
    like = lora.create(jax.random.key(0), params, rank=3, patterns=("layers/mlp/*",))
    with pytest.raises(ValueError, match=r"to_q.lora_A.weight is unexpected(.|\n)*w1.lora_A.weight is \(2, "):
        adapters.load(tmp_path, "zimage", module, like=like, alpha=ALPHA)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="adapter_model.bin.*can run code"):
        adapters.load(tmp_path / "pickled", "zimage", module, like=like, alpha=ALPHA)
    with pytest.raises(FileNotFoundError, match="holds no adapters"):
        adapters.load(tmp_path / "none", "zimage", module, like=like, alpha=ALPHA)


def test_adapters_in_half_the_bytes_come_back_rounded(tmp_path):
    module, _, pairs = parts()
    adapters.save(tmp_path / "saved", "zimage", module, pairs, ALPHA, dtype="bfloat16")
    again = adapters.load(tmp_path / "saved", "zimage", module, like=pairs, alpha=ALPHA)
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(lambda x: jnp.float32(jnp.bfloat16(x)), pairs))


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (adapters.FILE, lambda data: data[:-1], "adapter_model.safetensors: .* truncated or damaged"),
        (adapters.FILE, lambda data: b"version https://git-lfs", "adapter_model.safetensors: corrupt or truncated"),
        (adapters.CONFIG, lambda data: data[:-3], "adapter_config.json holds no settings of adapters"),
        (adapters.CONFIG, lambda data: b"[1]", "adapter_config.json holds no settings of adapters"),
        (adapters.CONFIG, lambda data: data.replace(b'"r"', b'"rank"'), "numbers r and lora_alpha, found r=None"),
        (adapters.CONFIG, lambda data: data.replace(b": 6", b': "6"'), "found r=2 and lora_alpha='6'"),
    ],
)
def test_damaged_files_are_told(tmp_path, name, damage, told):
    module, _, pairs = parts()
    adapters.save(tmp_path / "saved", "zimage", module, pairs, ALPHA)
    file = tmp_path / "saved" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=told):
        adapters.load(tmp_path / "saved", "zimage", module, like=pairs, alpha=ALPHA)


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"layers.0": 2}}, {"peft_type": "IA3"}])
def test_other_kinds_of_adapters_are_refused(change, tmp_path):
    module, _, pairs = parts()
    adapters.save(tmp_path / "saved", "zimage", module, pairs, ALPHA)
    file = tmp_path / "saved" / adapters.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"other adapters than plain LoRA: .*{next(iter(change))}"):
        adapters.load(tmp_path / "saved", "zimage", module, like=pairs, alpha=ALPHA)
