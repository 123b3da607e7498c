"""Loading and saving of Hugging Face checkpoints: exact both ways, and strict about everything that does not fit."""

import json
import os
import pathlib
import pwd
import shutil
import struct
import subprocess
import sys
import tracemalloc

import diffusers
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from etils import epath

from npedit_jax import weights
from npedit_jax.models.autoencoder import Autoencoder
from npedit_jax.models.denoiser import Denoiser
from npedit_jax.weights import kinds, safetensors_io, saving
from npedit_jax.weights.table import LAYOUTS, Row, check_table

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CHECKPOINTS = {
    "A/transformer": "zimage",
    "B/vae": "autoencoder",
    "C/text_encoder": "qwen3",
    "D/internvl_chat": "internvl",
    "D/internvl_native": "internvl",
    "D/llava_onevision": "llava_onevision",
}


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def copy_checkpoint(source: str, directory: pathlib.Path, change=lambda tensors: tensors) -> pathlib.Path:
    """Writes a golden checkpoint, its tensors changed, as one file."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text((GOLDEN / source / "config.json").read_text())
    safetensors.numpy.save_file(change(read_tensors(GOLDEN / source)), directory / "model.safetensors")
    return directory


def flatten(params) -> dict[str, jax.Array]:
    return flax.traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize("source", CHECKPOINTS)
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 40_000])
def test_round_trip_gives_the_same_bytes_and_module(source, max_shard_bytes, tmp_path):
    kind = CHECKPOINTS[source]
    module, params = weights.load(kind, GOLDEN / source, dtype=None, keep_unused=True)
    weights.save(kind, module, params, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    original, saved = read_tensors(GOLDEN / source), read_tensors(tmp_path / "saved")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        assert (saved[name].dtype, saved[name].shape) == (tensor.dtype, tensor.shape), name
        assert saved[name].tobytes() == tensor.tobytes(), name
    assert weights.load(kind, tmp_path / "saved")[0] == module


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_undo_themselves(layout):
    x = np.arange(1 * 2 * 3 * 4).reshape((6, 4) if layout == "dense" else (1, 2, 3, 4))
    row = Row("a", "b", layout)
    np.testing.assert_array_equal(row.to_source(row.to_flax(x)), x)
    assert row.source_shape(row.to_flax(x).shape) == x.shape


def test_stacked_parameter_holds_each_layer_in_its_place():
    _, params = weights.load("zimage", GOLDEN / "A/transformer")
    tensors = read_tensors(GOLDEN / "A/transformer")
    kernels = flatten(params)["layers/attention/query/kernel"]
    assert len(kernels) == 2
    for layer, kernel in enumerate(kernels):
        np.testing.assert_array_equal(kernel, tensors[f"layers.{layer}.attention.to_q.weight"].T.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_take_the_dtype_asked_for(dtype):
    module, params = weights.load("qwen3", GOLDEN / "C/text_encoder", dtype=dtype, compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(jax.numpy.dtype(dtype))}
    assert module.decoder.dtype == jax.numpy.bfloat16
    stored = read_tensors(GOLDEN / "C/text_encoder")["embed_tokens.weight"]
    embedding = flatten(params)["decoder/embedding/embedding"]
    np.testing.assert_array_equal(np.asarray(embedding), stored.astype(embedding.dtype))


def test_unused_tensors_are_dropped_or_kept_beside_the_parameters(tmp_path):
    directory = GOLDEN / "C/text_encoder"
    _, dropped = weights.load("qwen3", directory)
    module, kept = weights.load("qwen3", directory, keep_unused=True)
    assert set(kept) - set(dropped) == {"unused"}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(kept["unused"]))
    ids, mask = np.arange(6)[None], np.ones((1, 6), bool)
    np.testing.assert_array_equal(*(module.apply({"params": p}, ids, mask) for p in (dropped, kept)))

    weights.save("qwen3", module, dropped, tmp_path / "saved")
    missing = read_tensors(directory).keys() - read_tensors(tmp_path / "saved").keys()
    assert {name.split(".")[0] for name in missing} == {"layers", "norm"}
    weights.load("qwen3", tmp_path / "saved", keep_unused=True)  # what is not used may be absent


def test_every_misfit_is_reported_at_once_with_both_names(tmp_path):
    def change(tensors):
        del tensors["decoder.conv_in.bias"]
        tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :2]
        tensors["encoder.conv_out.bias"] = tensors["encoder.conv_out.bias"].astype(np.int8)
        return tensors | {"encoder.extra.weight": np.zeros(3, np.float16)}

    with pytest.raises(ValueError) as error:
        weights.load("autoencoder", copy_checkpoint("B/vae", tmp_path, change))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 4
    for source, target, what in [
        ("decoder.conv_in.bias", "decoder/conv_in/bias", "missing"),
        ("encoder.conv_in.weight [8, 2, 3, 3]", "encoder/conv_in/kernel [3, 3, 3, 8]", "expected source [8, 3, 3, 3]"),
        ("encoder.conv_out.bias", "encoder/conv_out/bias", "int8"),
        ("encoder.extra.weight", "", "unexpected"),
    ]:
        assert any(source in line and target in line and what in line for line in lines), (source, lines)


def test_misfit_of_one_layer_of_a_stack_is_named(tmp_path):
    def change(tensors):
        tensors["layers.1.attention.to_q.weight"] = tensors["layers.1.attention.to_q.weight"][:-1]
        del tensors["layers.0.attention.to_k.weight"]
        return tensors

    with pytest.raises(ValueError) as error:
        weights.load("zimage", copy_checkpoint("A/transformer", tmp_path, change))
    assert "source layers.1.attention.to_q.weight [63, 64] -> target layers/attention/query/kernel" in str(error.value)
    assert "missing: source layers.0.attention.to_k.weight -> target layers/attention/key/kernel" in str(error.value)


@pytest.fixture
def sharded(tmp_path) -> pathlib.Path:
    module, params = weights.load("autoencoder", GOLDEN / "B/vae")
    weights.save("autoencoder", module, params, tmp_path / "sharded", max_shard_bytes=100_000)
    return tmp_path / "sharded"


def test_shards_keep_to_their_size_and_the_index_is_true(sharded):
    index = json.loads((sharded / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(sharded.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        tensors = safetensors.numpy.load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 100_000
        total += size
    assert total == index["metadata"]["total_size"]


def test_the_original_library_reads_what_is_saved(sharded):
    model = diffusers.AutoencoderKL.from_pretrained(sharded, low_cpu_mem_usage=False)
    for name, tensor in read_tensors(GOLDEN / "B/vae").items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), tensor.astype(np.float32))


def test_tensor_in_two_shards_is_an_error(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    first, second = (safetensors.numpy.load_file(file) for file in files[:2])
    name = min(first)
    safetensors.numpy.save_file(second | {name: first[name]}, files[1])
    with pytest.raises(ValueError, match="duplicate") as error:
        weights.load("autoencoder", sharded)
    assert all(part in str(error.value) for part in (name, "-> target", files[0].name, files[1].name))


def test_index_that_does_not_match_its_shards_is_an_error(sharded):
    file = sharded / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = list(index["weight_map"])
    index["weight_map"]["decoder.nowhere"] = index["weight_map"][names[0]]
    del index["weight_map"][names[1]]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        weights.load("autoencoder", sharded)
    assert "no shard has it: source decoder.nowhere -> target unknown" in str(error.value)
    assert f"not in the index: source {names[1]} -> target" in str(error.value)
    file.write_text(json.dumps({"weight_map": {names[0]: "a.safetensors", names[1]: ["b.safetensors"]}}))
    with pytest.raises(ValueError, match=f"{file.name}: not a safetensors index: .*{names[1]}"):
        weights.load("autoencoder", sharded)


def test_owner_of_a_file_need_have_no_name(monkeypatch):
    """In containers that run as any number, `epath.Path.stat` fails."""
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    file = epath.Path(next((GOLDEN / "B/vae").glob("*.safetensors")))
    with pytest.raises(KeyError):
        file.stat()
    assert "decoder.conv_in.bias" in safetensors_io.read_header(file)


def test_missing_shard_is_an_error(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        weights.load("autoencoder", sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "weights.ckpt", "student.pkl"])
@pytest.mark.parametrize("config", [True, False])
def test_pickles_are_refused_with_the_way_out(name, config, tmp_path):
    if config:
        (tmp_path / "config.json").write_text((GOLDEN / "B/vae/config.json").read_text())
    (tmp_path / name).write_bytes(b"\x80\x02")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name}.*safe_serialization=True.*save_file"):
            weights.load("autoencoder", path)


def test_an_index_names_safetensors_files_beside_it_and_no_others(sharded):
    file = sharded / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(index["weight_map"]))
    for other, message in [
        ("../elsewhere.safetensors", "outside its directory: .*elsewhere"),
        (str(sharded.parent / "a.safetensors"), "outside its directory"),
        ("model-00001.bin", "model-00001.bin.*can run code.*safe_serialization=True"),
    ]:
        file.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {name: other}}))
        with pytest.raises(ValueError, match=message):
            weights.load("autoencoder", sharded)


def test_directories_without_config_or_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        weights.load("autoencoder", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        weights.load("autoencoder", tmp_path)
    (tmp_path / "config.json").write_text((GOLDEN / "B/vae/config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        weights.load("autoencoder", tmp_path)
    with pytest.raises(ValueError, match="'vae'.*autoencoder"):
        weights.load("vae", tmp_path)


def file_bytes(header, data=b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def tensor_header(start=0, stop=8, dtype="F32", shape=(2,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (struct.pack("<Q", 1000) + b"{}", "claims 1000 bytes, the file has 2"),
        (struct.pack("<Q", 2**63) + b"{}", "corrupt or truncated"),
        (file_bytes(b"{not json"), "corrupt header"),
        (file_bytes(b"\xff\xfe{}"), "corrupt header"),
        (file_bytes(["a"]), "corrupt header"),
        (file_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "data_offsets"),
        (file_bytes({"a": tensor_header()}, bytes(7)), "truncated"),
        (file_bytes({"a": tensor_header()}, bytes(9)), "damaged"),
        (file_bytes({"a": tensor_header(shape=(3,))}, bytes(8)), "'a' of F32 \\[3\\]"),
        (file_bytes({"a": tensor_header(), "b": tensor_header(4, 12)}, bytes(12)), "'b'.*expected 8 to 16"),
        (file_bytes({"a": tensor_header(), "b": tensor_header(12, 20)}, bytes(20)), "'b'.*expected 8 to 16"),
        (file_bytes({"a": tensor_header(dtype="Q4")}, bytes(8)), "'Q4'"),
        (file_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(tensor_header()).encode(),) * 2), bytes(8)), "given twice"),
    ],
)
def test_damaged_file_is_named_with_its_fault(content, message, tmp_path):
    (tmp_path / "config.json").write_text((GOLDEN / "B/vae/config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
        weights.load("autoencoder", tmp_path)


def to_causal(tensors):
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def to_nested(tensors):
    old, new = "vision_tower.", "vision_tower.vision_model."
    return {name.replace(old, new, 1) if name.startswith(old) else name: x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("source", "change"), [("C/text_encoder", to_causal), ("D/llava_onevision", to_nested)], ids=["qwen3", "llava"]
)
def test_both_spellings_of_names_are_read_and_kept(source, change, tmp_path):
    kind = CHECKPOINTS[source]
    _, expected = weights.load(kind, GOLDEN / source, keep_unused=True)
    original = copy_checkpoint(source, tmp_path / "original", change)
    module, found = weights.load(kind, original, dtype=None, keep_unused=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    weights.save(kind, module, found, tmp_path / "saved")
    before, after = read_tensors(original), read_tensors(tmp_path / "saved")
    assert {name: x.tobytes() for name, x in after.items()} == {name: x.tobytes() for name, x in before.items()}
    assert weights.load(kind, tmp_path / "saved")[0] == module


def test_names_in_two_spellings_are_refused(tmp_path):
    copy_checkpoint("C/text_encoder", tmp_path, lambda tensors: tensors | {"model.norm.weight": tensors["norm.weight"]})
    with pytest.raises(ValueError, match="unexpected: source norm.weight"):
        weights.load("qwen3", tmp_path)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("C/text_encoder", "norm.weight"),
        ("C/text_encoder", "layers.3.self_attn.q_proj.weight"),
        ("D/llava_onevision", "vision_tower.post_layernorm.bias"),
    ],
)
def test_tensors_that_are_not_used_have_their_shape_all_the_same(source, name, tmp_path):
    kind = CHECKPOINTS[source]
    directory = copy_checkpoint(source, tmp_path / "cut", lambda tensors: tensors | {name: tensors[name][:-1]})
    with pytest.raises(ValueError, match=f"shape: source {name} .* -> target unused/.*expected source"):
        weights.load(kind, directory)
    module, params = weights.load(kind, GOLDEN / source, keep_unused=True)
    path, leaf = next(iter(flatten(params["unused"]).items()))
    cut = flax.traverse_util.unflatten_dict(flatten(params) | {f"unused/{path}": leaf[..., :-1]}, sep="/")
    with pytest.raises(ValueError, match=f"shape: target unused/{path}"):
        weights.save(kind, module, cut, tmp_path / "saved")


def test_a_tied_output_matrix_may_be_stored_all_the_same(tmp_path):
    def tied(tensors):
        return tensors | {"language_model.lm_head.weight": tensors["language_model.model.embed_tokens.weight"]}

    directory = copy_checkpoint("D/internvl_chat", tmp_path, tied)
    config = json.loads((directory / "config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    (directory / "config.json").write_text(json.dumps(config))
    module, params = weights.load("internvl", directory, keep_unused=True)
    assert module.language.tied_embeddings
    assert flatten(params)["unused/unembedding/embedding"].shape == (module.language.vocabulary, module.language.width)


def test_answer_ids_come_from_the_tokenizer_unless_given(tmp_path):
    vocabulary = json.loads((GOLDEN / "D/internvl_chat/tokenizer.json").read_text())["model"]["vocab"]
    module, _ = weights.load("internvl", GOLDEN / "D/internvl_chat")
    assert module.answer_ids == (vocabulary["No"], vocabulary["Yes"])
    assert weights.load("internvl", GOLDEN / "D/internvl_chat", answer_ids=(1, 2))[0].answer_ids == (1, 2)
    assert weights.load("internvl", GOLDEN / "D/internvl_native")[0].answer_ids is None


def test_tokenizer_that_splits_an_answer_is_refused(tmp_path):
    copy_checkpoint("D/internvl_chat", tmp_path)
    tokenizer = json.loads((GOLDEN / "D/internvl_chat/tokenizer.json").read_text())
    tokenizer["model"]["merges"].remove(["Ye", "s"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match='expected "Yes" to be one token'):
        weights.load("internvl", tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"<unk>": 0, "hello": 1}, 'tokenizer does not know it and gives "<unk>"'),
        ({"<unk>": 0, "Yes": 1}, 'expected "No" to be a token'),
        ({"<unk>": 0, "Yes": 1, "No": 100_000}, "ids \\(100000, 1\\); expected two different ones below"),
    ],
)
def test_tokenizer_that_does_not_know_the_answers_is_refused(vocabulary, message, tmp_path):
    copy_checkpoint("D/internvl_chat", tmp_path)
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=message):
        weights.load("internvl", tmp_path)


@pytest.mark.parametrize("answers", [[1, 1], [3, 100_000], [2, 1]])
def test_answers_of_the_config_are_two_tokens_and_the_tokenizers(answers, tmp_path):
    copy_checkpoint("D/internvl_chat", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"npedit": {"answer_ids": answers}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if answers == [2, 1]:
        assert weights.load("internvl", tmp_path)[0].answer_ids == (2, 1)
        shutil.copy(GOLDEN / "D/internvl_chat/tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="its tokenizer at|expected two different ones below"):
        weights.load("internvl", tmp_path)


def test_host_memory_stays_near_the_parameters_themselves(tmp_path):
    config = {"num_hidden_layers": 9, "hidden_size": 64, "intermediate_size": 2048, "vocab_size": 16}
    config = json.loads((GOLDEN / "C/text_encoder/config.json").read_text()) | config
    module = kinds.build("qwen3", config)
    shapes = kinds.parameter_shapes("qwen3", module)
    params = flax.traverse_util.unflatten_dict({p: np.zeros(s, np.float32) for p, s in shapes.items()}, sep="/")
    weights.save("qwen3", module, params, tmp_path / "saved")
    largest = max(4 * int(np.prod(shape)) for shape in shapes.values())
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert largest == 8 * 64 * 2048 * 4

    tracemalloc.start()
    _, loaded = weights.load("qwen3", tmp_path / "saved")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held > total  # the CPU client keeps the host buffers as its own instead of copying them
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, loaded, params))
    assert peak < total + 0.5 * largest


SHARDED_LOAD = """
import re, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from flax.traverse_util import flatten_dict, unflatten_dict
from npedit_jax import weights

source, target = sys.argv[1:]
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
specs = {
    "layers/.*kernel": P(None, "fsdp"),
    "layers/.*norm/scale": P("fsdp"),
    "patch_embedding/kernel": P(None, "fsdp"),
}

def place(path):
    return NamedSharding(mesh, next((spec for pattern, spec in specs.items() if re.match(pattern, path)), P()))

module, plain = weights.load("zimage", source, dtype=None)
_, by_path = weights.load("zimage", source, dtype=None, shardings=place)
tree = {path: place(path) for path in flatten_dict(plain, sep="/")}
_, by_tree = weights.load("zimage", source, dtype=None, shardings=unflatten_dict(tree, sep="/"))
used = set()
for params in (by_path, by_tree):
    for path, array in flatten_dict(params, sep="/").items():
        assert array.sharding == place(path), path
        used.add(place(path).spec)
        np.testing.assert_array_equal(array, flatten_dict(plain, sep="/")[path])
assert len(used) == 3, used
weights.save("zimage", module, by_path, target)

del tree["patch_embedding/kernel"]
try:
    weights.load("zimage", source, shardings=unflatten_dict(tree, sep="/"))
except ValueError as error:
    assert "patch_embedding/kernel" in str(error), error
else:
    raise AssertionError("a tree without an entry was accepted")
"""


def test_shardings_by_path_and_by_tree_on_two_devices(tmp_path):
    source = GOLDEN / "A/transformer"
    subprocess.run(
        [sys.executable, "-c", SHARDED_LOAD, source, tmp_path / "saved"],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        check=True,
    )
    original, saved = read_tensors(source), read_tensors(tmp_path / "saved")
    assert {name: x.tobytes() for name, x in saved.items()} == {name: x.tobytes() for name, x in original.items()}


def test_save_converts_the_dtype_when_asked(tmp_path):
    module, params = weights.load("autoencoder", GOLDEN / "B/vae")
    weights.save("autoencoder", module, params, tmp_path / "saved", dtype="bfloat16")
    for name, tensor in read_tensors(tmp_path / "saved").items():
        assert tensor.dtype == ml_dtypes.bfloat16, name
    with pytest.raises(ValueError, match="complex64"):
        weights.save("autoencoder", module, params, tmp_path / "other", dtype="complex64")


def test_save_reports_all_parameters_that_do_not_fit(tmp_path):
    module, params = weights.load("autoencoder", GOLDEN / "B/vae")
    params["decoder"]["surplus"] = np.zeros(2)
    del params["decoder"]["conv_in"]["bias"]
    params["encoder"]["conv_in"]["bias"] = np.zeros(5)
    with pytest.raises(ValueError) as error:
        weights.save("autoencoder", module, params, tmp_path / "saved")
    for path in (
        "unexpected: target decoder/surplus",
        "missing: target decoder/conv_in/bias",
        "encoder/conv_in/bias [5]",
    ):
        assert path in str(error.value)
    assert not list(tmp_path.iterdir())


def test_save_never_overwrites(sharded):
    module, params = weights.load("autoencoder", sharded)
    with pytest.raises(FileExistsError, match="not empty"):
        weights.save("autoencoder", module, params, sharded)


def test_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    module, params = weights.load("autoencoder", GOLDEN / "B/vae")
    write_file, calls = saving.write_file, []

    def fail_on_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_file(*arguments)

    monkeypatch.setattr(saving, "write_file", fail_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        weights.save("autoencoder", module, params, tmp_path / "saved", max_shard_bytes=100_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "module"), [("autoencoder", Autoencoder()), ("zimage", Denoiser())])
def test_full_size_tables_fit_their_modules(kind, module):
    network = kinds.kind_module(kind)
    assert network.build(network.describe(module)) == module
    assert not check_table(network.rows(module), kinds.parameter_shapes(kind, module))


def test_table_faults_are_found():
    shapes = {"a/kernel": (4, 2), "b/kernel": (3, 4, 2), "c/bias": (2,)}
    good = [Row("a", "a/kernel", "dense"), Row("b.{i}", "b/kernel", "dense", layers=3), Row("c", "c/bias")]
    assert not check_table(good, shapes)
    for changed, message in [
        (good[:2], "target c/bias [2] has no row"),
        ([*good, Row("d", "d/bias")], "target d/bias: the module has no such parameter"),
        ([*good, Row("c2", "c/bias")], "target c/bias has 2 rows"),
        ([*good[:2], Row("a", "c/bias")], "source a is not used exactly once: a/kernel"),
        ([*good[:2], Row("c", "c/bias", "dense")], "layout 'dense' needs 2 axes"),
        ([*good[:2], Row("c", "c/bias", "twist")], "layout 'twist'"),
        ([good[0], Row("b.{i}", "b/kernel", "dense", layers=2), good[2]], "should stack 2 layers"),
        ([*good, Row("d", "d/bias", like="a/kernel")], "go to unused/"),
        ([*good, Row("d", "unused/bias", like="elsewhere")], "it is like elsewhere"),
        ([Row("a", "a/kernel", "dense", part=1, parts=3), *good[1:]], "a/kernel (piece 1 of 3)"),
    ]:
        assert any(message in problem for problem in check_table(changed, shapes)), message
