"""Networks as Orbax checkpoints: the same parameters, on the devices asked for, and refusals."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from npedit_jax import convert, parallel, weights
from npedit_jax.training import networks
from npedit_jax.weights import converted

GOLDEN = pathlib.Path(__file__).parent / "golden"
SOURCES = {
    "zimage": "A/transformer",
    "autoencoder": "B/vae",
    "qwen3": "C/text_encoder",
    "internvl": "D/internvl_chat",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_converted_network_is_the_same(kind, tmp_path):
    source = GOLDEN / SOURCES[kind]
    convert.main(["--model", kind, "--source", str(source), "--output", str(tmp_path / "new")])
    module, params = weights.load(kind, source, dtype=None)
    module_again, params_again = weights.load(kind, tmp_path / "new", dtype=None)
    assert module_again == module  # a scorer's answers come from the tokenizer that was copied along
    assert jax.tree.structure(params_again) == jax.tree.structure(params)
    for expected, found in zip(jax.tree.leaves(params), jax.tree.leaves(params_again), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_networks_of_a_config_take_a_converted_directory(tmp_path):
    convert.convert("autoencoder", GOLDEN / "B/vae", tmp_path / "new", dtype="bfloat16")
    spec = dict(kind="autoencoder", directory=str(tmp_path / "new"), architecture={}, options=dict(remat="full"))
    mesh = parallel.make_mesh()
    network = networks.create(spec, rng=None, mesh=mesh)
    assert network.module.remat == "full"
    assert {leaf.dtype for leaf in jax.tree.leaves(network.params)} == {np.dtype(np.float32)}
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(network.params)} == {mesh}


SHARDED_READ = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from npedit_jax import weights

source, target = sys.argv[1:]
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
place = lambda path: NamedSharding(mesh, P(None, "fsdp") if path.endswith("attention/query/kernel") else P())
_, expected = weights.load("zimage", source, dtype=None)
_, found = weights.load("zimage", target, dtype=None, shardings=place)
jax.tree.map(np.testing.assert_array_equal, found, expected)
kernel = found["layers"]["attention"]["query"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (2, 16, 64), kernel.sharding
assert len({shard.device for shard in kernel.addressable_shards}) == 4
"""


def test_parameters_are_read_onto_their_devices(tmp_path):
    convert.convert("zimage", GOLDEN / SOURCES["zimage"], tmp_path / "new")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", SHARDED_READ, str(GOLDEN / SOURCES["zimage"]), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_large_parameters_are_stored_in_chunks(tmp_path, monkeypatch):
    """A host that holds a part of a parameter does not read all of it."""
    monkeypatch.setattr(converted, "CHUNK_BYTES", 1024)
    convert.convert("zimage", GOLDEN / SOURCES["zimage"], tmp_path / "new")
    with converted._checkpointer() as checkpointer:
        metadata = checkpointer.metadata(tmp_path / "new" / "params").item_metadata.tree
    kernel = metadata["layers"]["mlp"]["gate"]["kernel"]
    assert np.prod(kernel.storage.chunk_shape) * 2 <= 1024 < np.prod(kernel.shape) * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted autoencoder among directories that cannot be converted or read."""
    folder = tmp_path_factory.mktemp("convert")
    convert.convert("autoencoder", GOLDEN / "B/vae", folder / "done")
    for name in ("full", "empty", "pickled"):
        (folder / name).mkdir()
    for name in ("full", "pickled"):
        (folder / name / "config.json").write_text((GOLDEN / "B/vae/config.json").read_text())
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": "empty"}, "no empty/config.json"),
        ({"source": "nowhere"}, "no nowhere/config.json"),
        ({"source": "pickled"}, "pickled weights"),
        ({"source": "done"}, "done is converted already"),
        ({"output": "full"}, "full is not empty"),
        ({"output": "full/config.json"}, "config.json is not empty"),
        ({"model": "zimage"}, "unexpected"),
    ],
)
def test_what_cannot_be_converted_is_told_in_one_line(folder, monkeypatch, change, told):
    monkeypatch.chdir(folder)
    options = {"model": "autoencoder", "source": str(GOLDEN / "B/vae"), "output": "new"} | change
    with pytest.raises(SystemExit) as error:
        convert.main([f"--{name}={value}" for name, value in options.items()])
    line = str(error.value.code)
    assert line.startswith("convert: ") and told in line and "\n" not in line
    assert not (folder / "new").exists()


def test_unfinished_and_misfitting_directories_are_refused(folder, tmp_path):
    (tmp_path / "params").symlink_to(folder / "done" / "params")
    with pytest.raises(FileNotFoundError, match="config.json"):
        weights.load("autoencoder", tmp_path)
    config = json.loads((GOLDEN / "B/vae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latent_channels": 8, "mid_block_add_attention": False}))
    with pytest.raises(ValueError, match="convert again") as error:
        weights.load("autoencoder", tmp_path)
    assert "shape: target decoder/conv_in/kernel" in str(error.value) and "unexpected: encoder" in str(error.value)
    with pytest.raises(ValueError, match="drops what is not used"):
        weights.load("autoencoder", folder / "done", keep_unused=True)
