"""The exported editor in PyTorch alone makes the pictures of the JAX editor, and the release's own latents."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from PIL import Image

from npedit_jax import Editor, export, pictures
from npedit_jax.pytorch import edit
from npedit_jax.training import networks
from tests.tiny_editor import TEXT_ENCODER, write_run

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WORDS = str(networks.resolve("package:pretrained/easyvqa/text_encoder"))
RELEASE = dict(times=(1.0, 0.9474, 0.8571, 0.6667), sampler="ddim", eta=1.0)
# Of each editor: its tokenizer, sampling, and what its student has beyond diffusers' settings; pictures to edit.
EDITORS = {
    "z-image": (str(GOLDEN / "tokenizer"), RELEASE, {}),
    "masked": (str(GOLDEN / "tokenizer"), RELEASE | dict(eta=0.5), dict(npedit=dict(pad_tokens="mask"))),
    "easyvqa": (
        WORDS,
        dict(times=(1.0, 0.9, 0.75, 0.5), sampler="fresh", eta=1.0),
        dict(npedit=dict(pad_multiple=16, prediction="sample", position_embedding="sinusoidal"), all_patch_size=[1]),
    ),
}
SIZES = {"z-image": (20, 28), "masked": (24, 16), "easyvqa": (24, 16)}  # width and height
INSTRUCTION, SEED = "make the circle red", 3


@pytest.fixture(scope="module", params=EDITORS)
def exported(request, tmp_path_factory):
    """A run, what `export --frozen` makes of it, and a picture's width and height."""
    root = tmp_path_factory.mktemp("exported")
    tokenizer, sampling, student = EDITORS[request.param]
    run = write_run(root, tokenizer, sampling, student)
    export.export(run, root / "exported", frozen=True)
    return run, root / "exported", SIZES[request.param]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8))


def jax_noise(height: int, width: int) -> np.ndarray:
    """What the JAX editor draws: [steps, height, width, channels]."""
    return np.array(jax.random.normal(jax.random.key(SEED), (4, height, width, 4)))


def test_same_noise_gives_the_picture_of_the_jax_editor(exported):
    run, directory, (width, height) = exported
    image = picture(width, height)
    image.putalpha(Image.linear_gradient("L").resize(image.size))  # see-through at the top
    expected = np.asarray(Editor.from_checkpoint(run)(image, INSTRUCTION, seed=SEED)).astype(int)
    noise = torch.from_numpy(jax_noise(height // 2, width // 2)).permute(0, 3, 1, 2)
    found = np.asarray(edit.Editor.load([str(directory)])(image, INSTRUCTION, noise=noise)).astype(int)
    assert found.shape == expected.shape == (height, width, 3)
    assert ((expected > 0) & (expected < 255)).mean() > 0.5, "a picture of black and white alone would show little"
    assert np.abs(found - expected).max() <= 2


def test_four_steps_are_those_of_the_release():
    golden = safetensors.numpy.load_file(GOLDEN / "G" / "golden.safetensors")
    tensor = {name: torch.from_numpy(golden[f"u2nothing.{name}"][0]) for name in ("noise", "z", "txt")}
    transformer = edit.diffusers.ZImageTransformer2DModel.from_pretrained(
        GOLDEN / "G" / "student" / "transformer", torch_dtype=torch.float32
    )
    fresh = [torch.from_numpy(golden[f"infer.eta1.0.noise{step}"][0, :, 0]) for step in range(3)]

    def velocity(x, time):
        options = edit.Options(pad_tokens="mask")
        return edit.predict_velocity(transformer, options, x, time, tensor["txt"][:41], tensor["z"][:, 0])

    with torch.no_grad():
        found = edit.sample(velocity, torch.stack([tensor["noise"][:, 0], *fresh]), edit.Settings()).numpy()
    expected = golden["infer.eta1.0.x"][0, :, 0]
    assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected) * 4


def test_seed_decides_and_whole_language_models_are_read(tmp_path):
    """The base model's directory has the tokenizer in a folder of its own, and all layers of the language model."""
    run = write_run(tmp_path, *EDITORS["z-image"])
    export.export(run, tmp_path / "student")
    base = tmp_path / "base"
    export.export(run, base, frozen=True)
    (base / "tokenizer").mkdir()
    (base / "text_encoder" / "tokenizer.json").rename(base / "tokenizer" / "tokenizer.json")
    config = transformers.Qwen3Config(**{key: value for key, value in TEXT_ENCODER.items() if key != "model_type"})
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(base / "text_encoder")
    editor = edit.Editor.load([str(tmp_path / "student"), str(base)])
    ids = torch.tensor([editor.tokenizer.encode("<|im_start|>user\nadd<|im_end|>\n").ids])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(editor.text_encoder(ids).last_hidden_state, expected)
    first, again, other = (np.asarray(editor(picture(16, 16), INSTRUCTION, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """An exported editor that knows a few words."""
    root = tmp_path_factory.mktemp("words")
    export.export(write_run(root, *EDITORS["easyvqa"]), root / "exported", frozen=True)
    picture(16, 16).save(root / "good.png")
    picture(15, 16).save(root / "odd.png")
    (root / "broken.png").write_bytes((root / "good.png").read_bytes()[:60])
    np.save(root / "noise.npy", np.zeros((4, 3, 3, 4), np.float32))
    return root


def test_deep_grey_is_rounded_as_in_the_jax_editor():
    deep = Image.fromarray(np.arange(2**16, dtype=np.uint16).reshape(256, 256))
    np.testing.assert_array_equal(np.asarray(edit._upright(deep)), np.asarray(pictures.upright(deep)))


# Runs the file as a user's copy, where JAX and this package cannot be imported.
WITHOUT_JAX = """
import runpy, sys
for name in ("jax", "jaxlib", "flax", "npedit_jax", "etils"):
    sys.modules[name] = None
script = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_command_needs_no_jax_and_takes_saved_noise(words, tmp_path):
    directory = words / "exported"
    image = picture(24, 16)
    image.save(tmp_path / "in.png")
    np.save(tmp_path / "noise.npy", jax_noise(8, 12))
    script = tmp_path / "edit.py"
    script.write_bytes(pathlib.Path(edit.__file__).read_bytes())
    command = [sys.executable, "-c", WITHOUT_JAX, str(script), "--editor", str(directory), "--device", "cpu"]
    command += ["--image", "in.png", "--instruction", INSTRUCTION, "--output", "out.png", "--noise", "noise.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    noise = torch.from_numpy(jax_noise(8, 12)).permute(0, 3, 1, 2)
    expected = edit.Editor.load([str(directory)])(image, INSTRUCTION, noise=noise)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": "missing.png"}, "missing.png"),
        ({"image": "broken.png"}, "edit: "),
        ({"image": "odd.png"}, "15x16 pixels .* multiples of 2, at most 32x32"),
        ({"instruction": "make the dog purple"}, "words that this editor does not know"),
        ({"instruction": "remove the circle " * 20}, "longer than 48 tokens"),
        ({"noise": "noise.npy"}, r"expected noise of shape \[4, 4, 8, 8\], found \[4, 4, 3, 3\]"),
        ({"editor": "nowhere"}, "no transformer/config.json in nowhere; export with --frozen"),
    ],
)
def test_bad_input_is_told_in_one_line(words, monkeypatch, change, told):
    monkeypatch.chdir(words)
    options = {"editor": "exported", "image": "good.png", "instruction": INSTRUCTION, "output": "out.png"} | change
    with pytest.raises(SystemExit, match=told) as error:
        edit.main([f"--{name}={value}" for name, value in options.items()])
    assert str(error.value.code).startswith("edit: ") and "\n" not in str(error.value.code)
    assert not (words / "out.png").exists()


def test_task_is_told_by_what_the_instruction_begins_with(words, tmp_path):
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).symlink_to(words / "exported" / part)
    settings = json.loads((words / "exported" / "editor.json").read_text())
    settings["prefixes"] = {"editing": "", "customization": "make the circle red "}
    (tmp_path / "editor.json").write_text(json.dumps(settings))
    plain, told = (edit.Editor.load([str(tmp_path)], task=task) for task in ("editing", "customization"))
    expected = plain._encode_text("make the circle red remove the circle")
    torch.testing.assert_close(told._encode_text("remove the circle"), expected)
    with pytest.raises(ValueError, match=r"trained for \['editing', 'customization'\], not for cooking"):
        edit.Editor.load([str(tmp_path)], task="cooking")


def test_options_of_a_later_version_and_lost_tensors_are_told(words, tmp_path):
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).symlink_to(words / "exported" / part)
    (tmp_path / "editor.json").write_text(json.dumps(dict(times=[1.0], solver="euler")))
    with pytest.raises(ValueError, match=r"editor.json: unknown settings \['solver'\]"):
        edit.Editor.load([str(tmp_path)])
    (tmp_path / "editor.json").unlink()

    (tmp_path / "transformer").unlink()
    (tmp_path / "transformer").mkdir()
    config = json.loads((words / "exported" / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"npedit": {"pad": 3}}))
    with pytest.raises(ValueError, match=r"unknown options \['pad'\]"):
        edit.Editor.load([str(tmp_path)])
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    name = "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(words / "exported" / "transformer" / name)
    del tensors["x_pad_token"]
    safetensors.numpy.save_file(tensors, tmp_path / "transformer" / name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the tensors \['x_pad_token'\]"):
        edit.Editor.load([str(tmp_path)])
