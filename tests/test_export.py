"""Networks taken out of a run: their weights, the latents' normalisation, an editor's formats, and refusals."""

import json
import pathlib
import sys

import diffusers
import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from npedit_jax import export, weights
from npedit_jax.data import questions
from npedit_jax.pixels import to_pixels
from npedit_jax.training import loop, networks, stages, workdirs
from tests.data import record_sets
from tests.tiny_editor import noise, write_run
from tests.training.tiny import autoencoder_config
from tests.training.tiny_networks import lora_config

TOKENIZER = pathlib.Path(__file__).parent / "golden" / "tokenizer"
SAMPLING = dict(times=[1.0, 0.9474, 0.8571, 0.6667], sampler="ddim", eta=1.0)


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
    pixels = to_pixels(np.concatenate(list(export.training_images(autoencoder_config()))))
    latents = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))(pixels)
    assert abs(float(latents.mean())) < 2e-2
    assert abs(float(latents.std()) - 1.0) < 2e-2


def test_training_images_are_those_of_the_runs_records(tmp_path):
    """On a machine with other devices than the run's."""
    record_sets.write(tmp_path / "set", record_sets.photograph_records(5))
    config = autoencoder_config()
    data = dict(records=str(tmp_path / "set"), buckets=record_sets.BUCKETS[:1], options=dict(fraction=1.0, flip=0.0))
    config.data, config.mesh.fsdp = dict(config.data) | data, 16
    images = np.concatenate(list(export.training_images(config, count=20)))
    assert len(images) == 24 and images.shape[1:] == (*record_sets.BUCKETS[0], 3)
    assert len(np.unique(images.reshape(24, -1), axis=0)) == 5  # over and over


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


@pytest.fixture(scope="module")
def editor_run(tmp_path_factory):
    """A run of an editor; its average is 0.9 times its parameters."""
    return write_run(tmp_path_factory.mktemp("editor"), str(TOKENIZER), SAMPLING)


def test_transformer_in_shards_is_read_by_its_original_class(editor_run, tmp_path):
    written = export.export(editor_run, tmp_path, raw=True, max_shard_bytes=40_000)
    assert written == [str(tmp_path / "transformer"), str(tmp_path / "editor.json")]
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    model, info = diffusers.ZImageTransformer2DModel.from_pretrained(
        tmp_path / "transformer", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values())
    expected = safetensors.numpy.load_file(editor_run.parent / "student" / "diffusion_pytorch_model.safetensors")
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[name])


def test_settings_of_an_editor_of_several_tasks_tell_their_prefixes(editor_run, tmp_path):
    config = workdirs.read_config(editor_run)
    for told, prefixes in ((True, questions.TASK_PREFIXES), (False, {"customization": "", "editing": ""})):
        config.data.update(tasks=dict(customization=dict(), editing=dict()), task_prefix=told)
        file = export._write_settings(config, epath.Path(tmp_path))
        assert json.loads(file.read_text())["prefixes"] == prefixes


def test_frozen_networks_of_an_editor_come_along_on_request(editor_run, tmp_path):
    export.main(["--checkpoint", str(editor_run), "--output", str(tmp_path), "--frozen", "--dtype", "bfloat16"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["editor.json", "text_encoder", "transformer", "vae"]
    assert (tmp_path / "text_encoder" / "tokenizer.json").read_text() == (TOKENIZER / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "editor.json").read_text()) == SAMPLING | {"text_length": 48}
    # Latents of a frozen autoencoder are what the student was trained on: its shift and scale stay.
    assert weights.load("autoencoder", tmp_path / "vae")[0].scaling_factor == 0.7


@pytest.mark.parametrize(("options", "factor"), [([], 0.9), (["--raw"], 1.0)])
def test_state_dict_of_the_release(editor_run, tmp_path, capsys, options, factor):
    command = ["--checkpoint", str(editor_run), "--output", str(tmp_path), "--format", "npedit", "--pt", *options]
    export.main(command)
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ("student.safetensors", "student.pt")]
    found = safetensors.numpy.load_file(tmp_path / "student.safetensors")
    stored = safetensors.numpy.load_file(editor_run.parent / "student" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == {f"transformer.{name}" for name in stored}
    for name, value in stored.items():
        np.testing.assert_array_equal(found[f"transformer.{name}"], np.float32(factor) * value)
    with pytest.raises(SystemExit, match="student.safetensors is there already"):
        export.main(command)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A run of the warm-up with adapters, through the loop, its config and its end."""
    root = tmp_path_factory.mktemp("lora")
    config = lora_config()
    architecture = config.networks.base.architecture.to_dict()
    del architecture["npedit"]  # the release knows none of its options
    module = weights.build("zimage", architecture)
    weights.save("zimage", module, noise(networks.shapes("zimage", module)), root / "base")
    for name in ("base", "student"):
        config.networks[name] = dict(kind="zimage", directory=str(root / "base"), architecture={}, options={})
    workdirs.open_run(root / "run", config)
    return root / "run", config, loop.run(config, stages.build(config), root / "run")


def exported(run, output, *options):
    export.main(["--checkpoint", str(run), "--output", str(output), *options])
    return output


def test_adapters_of_a_run_are_pefts_and_a_start_for_another(lora_run, tmp_path):
    run, config, end = lora_run
    folder = exported(run, tmp_path / "adapter", "--format", "peft")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["peft_type"], told["r"], told["lora_alpha"], told["bias"]) == ("LORA", 2, 4, "none")
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    linear = {"to_q", "to_k", "to_v", "to_out.0"}, {"w1", "w2", "w3"}
    layers = [f"attention.{name}" for name in linear[0]] + [f"feed_forward.{name}" for name in linear[1]]
    layers = [f"layers.0.{name}" for name in [*layers, "adaLN_modulation.0"]]
    assert told["target_modules"] == sorted(layers)
    pairs = {f"base_model.model.{name}.lora_{part}.weight" for name in layers for part in "AB"}
    assert tensors.keys() == pairs and all(np.abs(value).max() > 0 for value in tensors.values())
    config = config.copy_and_resolve_references()
    config.lora.start.student = str(folder)
    again = stages.build(config).networks["student"].params
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(end.ema["student"]))
    with pytest.raises(SystemExit, match="export: .*adapter is not empty"):
        exported(run, folder, "--format", "peft")


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_merged_weights_of_a_run_with_adapters_are_base_and_adapter(lora_run, tmp_path, raw):
    run, config, _ = lora_run
    pairs = safetensors.numpy.load_file(
        exported(run, tmp_path / "adapter", "--format", "peft", *raw) / "adapter_model.safetensors"
    )
    expected = safetensors.numpy.load_file(f"{config.networks.base.directory}/diffusion_pytorch_model.safetensors")
    for name in sorted({name.rpartition(".lora_")[0] for name in pairs}):
        a, b = (pairs[f"{name}.lora_{part}.weight"] for part in "AB")
        expected[f"{name.removeprefix('base_model.model.')}.weight"] += 2.0 * b @ a
    folder = exported(run, tmp_path / "whole", *raw) / "transformer"
    model = diffusers.ZImageTransformer2DModel.from_pretrained(folder)
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-6, err_msg=name)
    release = exported(run, tmp_path / "release", "--format", "npedit", *raw) / "student.safetensors"
    for name, value in safetensors.numpy.load_file(release).items():
        np.testing.assert_array_equal(value, model.state_dict()[name.removeprefix("transformer.")].numpy())


def test_merged_weights_keep_what_a_base_in_bfloat16_would_round_away(lora_run, tmp_path):
    run, config, _ = lora_run
    config = config.copy_and_resolve_references()
    config.networks.base.options = dict(param_dtype="bfloat16")
    tiny = jax.tree.map(lambda x: 1e-2 * x, export._newest(run, raw=True)[1]["student"].params)
    whole = stages.whole(config, {"student": tiny})["student"]
    base = stages._makers(config, None)["base"]().params
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {np.dtype("bfloat16")}
    path = "layers/attention/query/kernel"
    kernel, stored, a, b = (
        np.asarray(flax.traverse_util.flatten_dict(tree, sep="/")[name], np.float32)
        for tree, name in ((whole, path), (base, path), (tiny, f"{path[:-7]}/a"), (tiny, f"{path[:-7]}/b"))
    )
    assert np.abs(kernel - stored).max() > 0
    np.testing.assert_allclose(kernel - stored, 2.0 * a @ b, atol=1e-7)


def test_peft_lays_the_adapter_on_the_original(lora_run, tmp_path):
    peft = pytest.importorskip("peft", reason="an optional reader; the layout is tested without")
    run, config, _ = lora_run
    folder = exported(run, tmp_path / "adapter", "--format", "peft")
    base = diffusers.ZImageTransformer2DModel.from_pretrained(config.networks.base.directory)
    model = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    expected = safetensors.numpy.load_file(
        exported(run, tmp_path / "whole") / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-6, err_msg=name)


def test_refusals_are_one_line(run, editor_run, tmp_path, monkeypatch, capsys):
    output = ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="export: .* trains no student"):
        export.main(["--checkpoint", str(run[0]), *output, "--format", "npedit"])
    with pytest.raises(SystemExit, match="export: .* is no run"):
        export.main(["--checkpoint", str(tmp_path), *output])
    with pytest.raises(SystemExit, match="export: .* trains no adapters"):
        export.main(["--checkpoint", str(editor_run), *output, "--format", "peft"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="export: --pt needs PyTorch"):
        export.main(["--checkpoint", str(editor_run), *output, "--format", "npedit", "--pt"])
    for options, told in ((["--pt"], "--pt goes with"), (["--format", "npedit", "--frozen"], "--frozen goes with")):
        with pytest.raises(SystemExit):
            export.main(["--checkpoint", str(editor_run), *output, *options])
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
