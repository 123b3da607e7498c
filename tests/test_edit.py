"""The editor on a small run: single and batched edits, seeds, metadata, and one line for every bad input."""

import io
import json
import shutil
import struct
import weakref

import jax
import numpy as np
import pytest
from PIL import Image

from npedit_jax import Editor, edit, pictures, sampling
from npedit_jax.data import questions
from npedit_jax.judge import Judge
from tests.faults.command import CONTEXT
from tests.tiny_editor import write_run

SAMPLING = dict(times=(1.0, 0.5), sampler="ddim", eta=1.0)
LONG_QUESTION = "remove the circle " * 14  # an instruction that the editor takes, and the scorer not
TOKENIZER = "package:pretrained/easyvqa/text_encoder"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training leaves it, of an editor with a scorer."""
    return write_run(tmp_path_factory.mktemp("editor"), TOKENIZER, SAMPLING, scorer=True)


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


def test_task_that_a_run_tells_apart_is_told_to_it(run, tmp_path):
    """Its prefix goes before the instruction, as in training; here of words that the small tokenizer has."""
    several = tmp_path / "several"
    shutil.copytree(run, several)
    config = json.loads((several / "config.json").read_text())
    config["data"] |= {"task_prefix": True, "tasks": {"editing": {"templates": "editing"}}}
    # As of a run on another machine: its kernels are not of this one, and its scorer is kept in half the memory.
    for name, kernel in {"student": "splash", "text_encoder": "cudnn", "scorer": "splash"}.items():
        config["networks"][name]["options"] = {"implementation": kernel}
    config["networks"]["scorer"]["options"] |= {"param_dtype": "bfloat16"}
    (several / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was trained for .'editing'., not for customization"):
        Editor.from_checkpoint(several, task="customization")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(questions.TASK_PREFIXES, "editing", "make the circle red ")
        told, plain = Editor.from_checkpoint(several), Editor.from_checkpoint(run)
    image = Image.fromarray(_images(1)[0])
    expected = plain(image, "make the circle red remove the circle")
    np.testing.assert_array_equal(np.asarray(told(image, "remove the circle")), np.asarray(expected))
    assert (np.asarray(plain(image, "remove the circle")) != np.asarray(expected)).any()
    for judge, templates in [(Judge.of_run(several, task="editing"), "editing"), (Judge.of_run(run), "easyvqa")]:
        wanted = questions.edit_questions(questions.TEMPLATES[templates], "", instruction="remove it", object="")
        assert judge.questions("remove it") == wanted
    modules = [told._modules["student"], told._modules["text_encoder"].decoder]
    judge = Judge.of_run(several, task="editing")
    modules += [judge._module.vision, judge._module.language]
    assert {module.implementation for module in modules} == {"xla"}
    assert {str(x.dtype) for x in jax.tree.leaves(judge._params)} == {"bfloat16"}


def test_short_last_batch_is_filled_up(editor):
    images, instructions = _images(3), ["make the circle red", "remove the circle", "do nothing."]
    whole = editor.edit_batch(images, instructions, [0, 1, 7]).astype(int)
    before = editor._program._cache_size()
    parts = editor.edit_batch(images, instructions, [0, 1, 7], batch_size=2).astype(int)
    assert np.abs(parts - whole).max() <= 1
    assert editor._program._cache_size() == before + 1


def test_arguments_that_do_not_fit_are_told(editor):
    with pytest.raises(ValueError, match="16x18 pixels .* multiples of 4, at most 64x64"):
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
        assert image.text == {"instruction": "make the circle red", "seed": "5", "checkpoint": str(run), "step": "1"}


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    """An editor trained at two sizes, square and wide."""
    run = write_run(tmp_path_factory.mktemp("bucketed"), TOKENIZER, SAMPLING, buckets=((16, 16), (12, 20)))
    return Editor.from_checkpoint(run)


@pytest.mark.parametrize(
    ("size", "taken"), [((1024, 1024), (16, 16)), ((900, 600), (20, 12)), ((7, 3), (20, 12)), ((60, 100), (16, 16))]
)
def test_photograph_goes_to_the_bucket_of_its_shape(bucketed, size, taken):
    image = Image.effect_noise(size, 50).convert("RGB")
    edited = bucketed(image, "make the circle red")
    assert edited.size == taken
    restored = bucketed(image, "make the circle red", original_size=True)
    assert restored.size == size
    np.testing.assert_array_equal(np.asarray(pictures.resize(edited, size)), np.asarray(restored))


def test_one_program_per_bucket(bucketed):
    before = bucketed._program._cache_size()
    for size in [(33, 35), (500, 500), (70, 40), (1000, 700)]:
        bucketed(Image.new("RGB", size), "remove the circle", seed=size[0])
    assert bucketed._program._cache_size() - before <= 2
    before = bucketed._program._cache_size()
    bucketed(Image.new("RGB", (640, 480)), "do nothing.", seed=4)
    assert bucketed._program._cache_size() == before


@pytest.mark.parametrize(
    ("size", "taken"), [((1000, 500), (64, 32)), ((15, 16), (16, 16)), ((17, 30), (16, 32)), ((5000, 10), (64, 4))]
)
def test_without_buckets_it_goes_to_the_nearest_multiples(editor, size, taken):
    assert editor.size(*size) == taken
    assert editor.fit(Image.new("L", size)).shape == (taken[1], taken[0], 3)


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    file = io.BytesIO()
    image.save(file, format="JPEG", exif=exif, quality=95)
    return file.getvalue()


def _png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()


def test_pictures_of_all_kinds_become_upright_rgb():
    picture = Image.new("RGB", (30, 20), "red")
    assert pictures.decode(_turned(picture)).size == (20, 30)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert pictures.decode(_png(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = picture.quantize(4)
    assert pictures.decode(_png(palette)).getpixel((3, 3)) == (255, 0, 0)
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert pictures.decode(_png(deep)).getpixel((0, 0)) == (128, 128, 128)
    file = io.BytesIO()
    picture.convert("CMYK").save(file, format="JPEG")
    assert pictures.decode(file.getvalue()).mode == "RGB"


def test_picture_with_too_many_pixels_is_refused_unread():
    bomb = _png(Image.new("1", (40_000, 40_000)))
    assert len(bomb) < 1_000_000
    with pytest.raises(ValueError, match="more than 67108864 pixels.*9000x9000"):
        pictures.decode(_png(Image.new("1", (9000, 9000))))
    with pytest.raises(ValueError, match="the image has more than 67108864 pixels"):
        pictures.decode(bomb)


def _tiled(side: int) -> bytes:
    """A TIFF of 16 x 16 grey pixels in one tile of that side."""
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: side, 323: side, 324: 138, 325: side * side}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + bytes(4) + bytes(16 * 16)


def test_picture_in_a_tile_of_too_many_pixels_is_refused_unread():
    assert pictures.decode(_tiled(16)).size == (16, 16)
    with pytest.raises(ValueError, match="more than 67108864 pixels.*26720x26720"):  # 2 GB in RGB, if Pillow read it
        pictures.decode(_tiled(26_720))


def test_sheet_does_not_take_the_place_of_its_picture(run, folder, capsys):
    words = ["--checkpoint", str(run), "--image", "good.png", "--sheet", "./good.png"]
    told = _told(capsys, folder, [*words, "--instruction", "remove the circle"])
    assert "sheet ./good.png is also the image to edit" in told


def test_sheet_shows_every_instruction_and_seed(run, tmp_path):
    Image.fromarray(_images(1)[0]).resize((90, 60)).save(tmp_path / "in.png")
    words = ["--checkpoint", str(run), "--image", str(tmp_path / "in.png"), "--sheet", str(tmp_path / "sheet.png")]
    words += ["--instruction", "make the circle red", "--instruction", "remove the circle", "--seeds", "3", "4", "9"]
    edit.main([*words, "--scores"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.text["seed"] == "3 4 9" and "remove the circle" in image.text["instruction"]
        assert image.width > 4 * 128 and image.height > 2 * 128
        assert len(image.convert("RGB").getcolors(maxcolors=2**20)) > 1000


def test_best_of_keeps_the_seed_that_the_scorer_prefers(run, tmp_path):
    Image.fromarray(_images(1)[0]).save(tmp_path / "in.png")
    one = ["--checkpoint", str(run), "--image", str(tmp_path / "in.png"), "--instruction", "make the circle red"]
    scores, texts = [], []
    for seed in range(3):
        edit.main([*one, "--output", str(tmp_path / f"{seed}.png"), "--seed", str(seed), "--scores"])
        texts.append(Image.open(tmp_path / f"{seed}.png").text)
        scores.append(float(texts[-1]["P(done)"]) * float(texts[-1]["P(rest kept)"]))
    assert len(set(scores)) == 3
    edit.main([*one, "--output", str(tmp_path / "best.png"), "--best-of", "3"])
    best = Image.open(tmp_path / "best.png")
    assert best.text["seed"] == str(np.argmax(scores))
    alone = np.asarray(Image.open(tmp_path / f"{np.argmax(scores)}.png")).astype(int)
    assert np.abs(np.asarray(best).astype(int) - alone).max() <= 1


def _scores(run, edits):
    judge = Judge.of_run(run)
    return judge(_images(3), edits, [judge.questions("remove the circle")] * 3, batch=3)


def _edit_on_two_devices(run, file):
    jax.config.update("jax_num_cpu_devices", 2)
    editor, meshes, encode = Editor.from_checkpoint(run), [], sampling.encode_image

    def encode_noting(*arguments):
        meshes.append(dict(jax.sharding.get_abstract_mesh().shape))
        return encode(*arguments)

    sampling.encode_image = encode_noting
    edits = editor.edit_batch(_images(3), ["make the circle red", "remove the circle", "do nothing."], [0, 1, 7])
    np.savez(file, edits=edits, scores=_scores(run, edits))
    assert meshes == [{"data": 2, "fsdp": 1, "tensor": 1}]  # known inside the program: XLA cannot split a kernel itself


@pytest.mark.slow
def test_batch_is_spread_over_the_devices(run, editor, tmp_path):
    process = CONTEXT.Process(target=_edit_on_two_devices, args=(run, tmp_path / "two.npz"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    one = editor.edit_batch(_images(3), ["make the circle red", "remove the circle", "do nothing."], [0, 1, 7])
    two = np.load(tmp_path / "two.npz")
    assert np.abs(two["edits"].astype(int) - one).max() <= 1
    np.testing.assert_allclose(two["scores"], _scores(run, two["edits"]), atol=1e-5)


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


def test_pictures_of_a_batch_are_not_all_in_memory(run, tmp_path, monkeypatch):
    made, most, read = [], [], pictures.read

    def counted(file):
        image = read(file)
        made.append(weakref.ref(image))
        most.append(sum(each() is not None for each in made))
        return image

    monkeypatch.setattr(edit.pictures, "read", counted)
    requests = []
    for number in range(20):
        Image.fromarray(_images(1)[0]).save(tmp_path / f"{number}.png")
        requests.append(edit.Request(str(tmp_path / f"{number}.png"), "do nothing.", "", number))
    assert len(dict(edit.make(run, requests, edit.DEFAULTS))) == 20
    assert len(most) == 40 and max(most) <= 3


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    """The current directory: good and bad inputs, and the run."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(_images(1)[0]).save("good.png")
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
        ({"instruction": "make the dog purple"}, "unknown words: dog, purple"),
        ({"instruction": "remove the circle " * 20}, "longer than 48 tokens"),
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
        ({"instruction": "make the dog purple"}, "unknown words: dog, purple"),
        ({"instruction": "remove \ud800"}, "half of a character"),
        ({"output": "folder.png"}, "is a folder"),
        ({"output": "a.png"}, "output a.png is asked for twice"),
        ({"output": "./good.png"}, "output ./good.png is also an image to edit"),
        ({"seed": -1}, "from 0 to 4294967295, found -1"),
        ({"instruction": LONG_QUESTION}, "the scorer's question 'was this done: remove the circle"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_line_of_a_batch_file_is_numbered(run, folder, capsys, line, told):
    good = {"image": "good.png", "instruction": "remove the circle", "output": "a.png"}
    bad = line if isinstance(line, bytes) else json.dumps(good | {"output": "b.png"} | line).encode()
    (folder / "requests.jsonl").write_bytes(json.dumps(good).encode() + b"\n" + bad + b"\n")
    message = _told(capsys, folder, ["--checkpoint", str(run), "--batch", "requests.jsonl", "--best-of", "2"])
    assert message.startswith("edit: requests.jsonl line 2: ") and told in message


def _leaves(tree, path=()):
    """Paths of all values of a config, the inner ones as well."""
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))


def _damaged(config, path, value):
    config = json.loads(json.dumps(config))
    *parents, last = path
    part = config
    for name in parents:
        part = part[name]
    if value is DELETED:
        del part[last]
    else:
        part[last] = value
    return config


DELETED = object()


def test_a_damaged_config_is_told_in_one_line(run, tmp_path, capsys):
    """Each of its values in turn taken away, or of another kind; some of which an editor has no use for."""
    config = json.loads((run / "config.json").read_text())
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    values = (DELETED, "x", 3, -0.5, [7], {}, None)
    cases = [(path, values[n % len(values)]) for n, path in enumerate(_leaves(config))]
    cases += [(("networks", "student", "options"), {"dtype": "float99"}), (("sampling", "times"), [0.5, 1.0])]
    refused = 0
    for path, value in cases:
        (copy / "config.json").write_text(json.dumps(_damaged(config, path, value)))
        for load in (Editor.from_checkpoint, Judge.of_run):
            try:
                load(copy)
            except (ValueError, OSError):
                refused += 1
    assert refused > 20
    (copy / "config.json").write_text(json.dumps(_damaged(config, ("sampling", "times"), "soon")))
    with pytest.raises(SystemExit) as stopped:
        edit.main(["--checkpoint", str(copy), "--image", "a.png", "--instruction", "x", "--output", "b.png"])
    assert stopped.value.code.startswith("edit: ") and "\n" not in stopped.value.code


def test_interrupted_write_leaves_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(type(pictures.epath.Path("x")), "replace", full)
    with pytest.raises(OSError, match="No space left"):
        pictures.write_png(Image.fromarray(_images(1)[0]), "out.png", {"seed": 0})
    assert sorted(folder.rglob("*")) == before
