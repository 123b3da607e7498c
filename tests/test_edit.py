"""The editor on a small run: single and batched edits, seeds, metadata, and one line for every bad input."""

import json

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

from npedit_jax import Editor, edit, weights
from npedit_jax.training import networks, state, workdirs
from npedit_jax.training.checkpoint import Checkpoints
from tests.training.tiny import AUTOENCODER

ARCHITECTURES = {
    "autoencoder": ("autoencoder", AUTOENCODER),
    "text_encoder": (
        "qwen3",
        dict(
            model_type="qwen3",
            vocab_size=41,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            tie_word_embeddings=True,
            hidden_act="silu",
        ),
    ),
    "student": (
        "zimage",
        dict(
            in_channels=2,
            dim=8,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=1,
            cap_feat_dim=8,
            axes_dims=(4, 2, 2),
            axes_lens=(64, 8, 8),
            npedit=dict(pad_multiple=4),
        ),
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training leaves it, with networks full of noise."""
    root = tmp_path_factory.mktemp("editor")
    rng = np.random.default_rng(0)
    specs, student = {}, None
    for name, (kind, architecture) in ARCHITECTURES.items():
        module = weights.build(kind, networks.plain(architecture))
        params = jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), networks.shapes(kind, module))
        weights.save(kind, module, params, root / name)
        specs[name] = dict(kind=kind, directory=str(root / name), architecture={}, options={})
        student = params if name == "student" else student
    config = ConfigDict(
        dict(
            stage="npedit",
            networks=specs,
            optimizer=dict(student={}),
            data=dict(text_tokenizer="package:pretrained/easyvqa/text_encoder", text_length=16),
            sampling=dict(times=(1.0, 0.5), sampler="ddim", eta=1.0),
        )
    )
    workdirs.open_run(root / "run", config)
    checkpoints = Checkpoints(root / "run", every=1, keep=1)
    checkpoints.save(1, state.create({"student": student}, {"student": optax.sgd(0.1)}, ("student",)), {}, force=True)
    checkpoints.close()
    return root / "run"


@pytest.fixture(scope="module")
def editor(run):
    return Editor.from_checkpoint(run)


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def test_batch_equals_single_edits(editor):
    images, instructions, seeds = _images(3), ["make the circle red", "remove the circle", "do nothing."], [0, 1, 7]
    together = editor.edit_batch(images, instructions, seeds).astype(int)
    for index in range(3):
        alone = editor(Image.fromarray(images[index]), instructions[index], seed=seeds[index])
        assert alone.size == (16, 16)
        assert np.abs(np.asarray(alone).astype(int) - together[index]).max() <= 1


def test_seed_and_instruction_decide(editor):
    image = Image.fromarray(_images(1)[0])
    first, again = (np.asarray(editor(image, "remove the circle", seed=3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(editor(image, "remove the circle", seed=4)) != first).any()
    assert (np.asarray(editor(image, "make the circle red", seed=3)) != first).any()


def test_warm_call_does_not_trace_again(editor):
    image = Image.fromarray(_images(1)[0])
    editor(image, "remove the circle")
    programs = editor._program._cache_size()
    editor(image, "paint the circle blue", seed=9)
    assert editor._program._cache_size() == programs


def test_short_last_batch_is_filled_up(editor):
    images, instructions = _images(3), ["make the circle red", "remove the circle", "do nothing."]
    whole = editor.edit_batch(images, instructions, [0, 1, 7]).astype(int)
    before = editor._program._cache_size()
    parts = editor.edit_batch(images, instructions, [0, 1, 7], batch_size=2).astype(int)
    assert np.abs(parts - whole).max() <= 1
    assert editor._program._cache_size() == before + 1


def test_arguments_that_do_not_fit_are_told(editor):
    with pytest.raises(ValueError, match="16x18 pixels .* multiples of 4, at most 32x32"):
        editor.edit_batch(np.zeros((1, 18, 16, 3), np.uint8), ["do nothing."], [0])
    with pytest.raises(ValueError, match="as many instructions and seeds as images"):
        editor.edit_batch(_images(2), ["do nothing."], [0, 1])
    with pytest.raises(ValueError, match="found float32"):
        editor.edit_batch(_images(1).astype(np.float32), ["do nothing."], [0])


def test_command_writes_a_png_that_tells_how_it_was_made(run, tmp_path):
    Image.fromarray(_images(1)[0]).save(tmp_path / "in.png")
    arguments = ["--image", str(tmp_path / "in.png"), "--output", str(tmp_path / "out.png"), "--seed", "5"]
    edit.main(["--checkpoint", str(run), "--instruction", "make the circle red", *arguments])
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (16, 16)
        assert image.text == {"instruction": "make the circle red", "seed": "5", "checkpoint": str(run)}


def test_batch_file_of_several_sizes(run, tmp_path):
    lines = []
    for index, size in enumerate([(16, 16), (8, 16), (16, 16)]):
        Image.fromarray(_images(3)[index]).resize(size).save(tmp_path / f"{index}.png")
        names = {"image": str(tmp_path / f"{index}.png"), "output": str(tmp_path / f"out{index}.png")}
        lines.append(json.dumps(names | {"instruction": "remove the circle"}))
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n\n")
    edit.main(["--checkpoint", str(run), "--batch", str(tmp_path / "requests.jsonl")])
    sizes = [Image.open(tmp_path / f"out{index}.png").size for index in range(3)]
    assert sizes == [(16, 16), (8, 16), (16, 16)]


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    """The current directory: good and bad inputs, and the run."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(_images(1)[0]).save("good.png")
    Image.fromarray(_images(1)[0][:, :15]).save("odd.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    for name in ("empty", "model", "damaged", "young", "folder.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "damaged" / "config.json").write_text('{"stage":')
    (tmp_path / "young" / "config.json").write_text((run / "config.json").read_text())
    return tmp_path


def _told(capsys, folder, words: list[str]) -> str:
    """The one line that a refused command tells; nothing has been written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as error:
        edit.main(words)
    line = str(error.value.code)  # which Python prints on stderr, exiting with 1
    assert line.startswith("edit: ") and "\n" not in line
    assert capsys.readouterr() == ("", "")
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": "missing.png"}, "image missing.png is not there"),
        ({"image": "broken.png"}, "image broken.png does not decode"),
        ({"image": "odd.png"}, "15x16 pixels"),
        ({"instruction": "make the dog purple"}, "unknown words: dog, purple"),
        ({"instruction": "remove the circle " * 9}, "longer than 16 tokens"),
        ({"seed": "-1"}, "from 0 to 4294967295, found -1"),
        ({"output": "nowhere/out.png"}, "the folder of output nowhere/out.png is missing"),
        ({"output": "folder.png"}, "is a folder"),
        ({"output": "out.jpg"}, "must end in .png"),
        ({"checkpoint": "empty"}, "empty is no run"),
        ({"checkpoint": "model"}, "model is no run of an editor"),
        ({"checkpoint": "damaged"}, "its config.json is damaged"),
        ({"checkpoint": "young"}, "young has no checkpoint yet"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_told_in_one_line_and_writes_nothing(run, folder, capsys, change, told):
    options = {"checkpoint": str(run), "image": "good.png", "instruction": "remove the circle", "output": "out.png"}
    words = [f"--{name}={value}" for name, value in (options | change).items()]
    assert told in _told(capsys, folder, words)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"not json", "no JSON"),
        (b'{"image": "\xe9"}', "no JSON in UTF-8"),
        (b'["a"]', "expected a JSON object, found list"),
        (b'{"image": "good.png"}', "instruction, output missing"),
        ({"image": 1}, "image must be of type str, found 1"),
        ({"seed": True}, "seed must be of type int, found True"),
        ({"sed": 1}, "unknown fields sed"),
        ({"image": "odd.png"}, "15x16 pixels"),
        ({"instruction": "make the dog purple"}, "unknown words: dog, purple"),
        ({"output": "folder.png"}, "is a folder"),
        ({"output": "a.png"}, "output a.png is asked for twice"),
    ],
    ids=str,
)
def test_bad_line_of_a_batch_file_is_numbered(run, folder, capsys, line, told):
    good = {"image": "good.png", "instruction": "remove the circle", "output": "a.png"}
    bad = line if isinstance(line, bytes) else json.dumps(good | {"output": "b.png"} | line).encode()
    (folder / "requests.jsonl").write_bytes(json.dumps(good).encode() + b"\n" + bad + b"\n")
    message = _told(capsys, folder, ["--checkpoint", str(run), "--batch", "requests.jsonl"])
    assert message.startswith("edit: requests.jsonl line 2: ") and told in message


def test_interrupted_write_leaves_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    request = edit.Request("good.png", "remove the circle", "out.png", 0)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(type(edit.epath.Path("x")), "replace", full)
    with pytest.raises(OSError, match="No space left"):
        edit.write_png(_images(1)[0], request, "run")
    assert sorted(folder.rglob("*")) == before
