"""The commands on photographs with a tiny editor: layout, figures, going on, grades, and two editors side by side."""

import json
import re
import urllib.parse

import numpy as np
import pytest
from PIL import Image
from skimage import data

from npedit_jax import evaluate
from npedit_jax.evaluation import cases, comparison, results
from tests.evaluation.test_cases import write_dreambooth, write_gedit
from tests.evaluation.vie_server import good, serving
from tests.tiny_editor import write_run

SAMPLING = dict(times=(1.0, 0.5), sampler="ddim", eta=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    tokenizer = "package:pretrained/easyvqa/text_encoder"
    return write_run(root, tokenizer, SAMPLING, scorer=True, buckets=((16, 16), (12, 20)))


@pytest.fixture
def photographs(tmp_path):
    """Real ones, two with the same shape, and one with a mask."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    lines = []
    for name, words, task in [
        ("astronaut", "make the circle red", "recolor"),
        ("coffee", "remove the circle", "remove"),
        ("chelsea", "make the circle red", "recolor"),
    ]:
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.jpg")
        lines.append({"image": f"{name}.jpg", "instruction": words, "task": task, "key": name})
    lines[1] |= {"edit_type": "remove", "object": "circle", "mask": "mask.png"}
    Image.fromarray(np.kron(np.eye(2), np.full((200, 300), 255)).astype(np.uint8)).save(folder / "mask.png")
    (folder / "instructions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def _evaluate(run, output, *words):
    evaluate.main(["--checkpoint", str(run), "--output", str(output), "--batch", "2", *map(str, words)])


def test_folder_of_photographs(run, photographs, tmp_path, capsys):
    words = ("--benchmark", "folder", "--data", photographs)
    _evaluate(run, tmp_path / "out", *words, "--name", "first")
    folder = tmp_path / "out" / "first"
    assert Image.open(folder / "recolor" / "astronaut.png").size == (16, 16)
    assert Image.open(folder / "remove" / "coffee.png").size == (20, 12)
    rows = {row["key"]: row for row in map(json.loads, (folder / "edits.jsonl").read_text().splitlines())}
    assert set(rows) == {"recolor/astronaut", "remove/coffee", "recolor/chelsea"}
    for row in rows.values():
        assert 0 < row["done"] < 1 and 0 < row["kept"] < 1 and -1 < row["ssim"] < 1 and 0 < row["psnr"] < 100
    summary = json.loads((folder / "summary.json").read_text())[""]
    assert summary["recolor"]["count"] == 2
    mean = np.mean([rows["recolor/astronaut"]["psnr"], rows["recolor/chelsea"]["psnr"]])
    assert summary["recolor"]["psnr"] == pytest.approx(mean)
    assert summary[results.TASKS]["psnr"] == pytest.approx((mean + rows["remove/coffee"]["psnr"]) / 2)
    printed = capsys.readouterr().out
    assert "recolor" in printed and results.ALL in printed
    links = re.findall(r'src="([^"]+)"', (folder / "index.html").read_text())
    assert len(links) == 6 and all((folder / link).is_file() for link in links)

    # Going on: what is there is not made again, and what is missing is.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    (folder / "remove" / "coffee.png").unlink()
    _evaluate(run, tmp_path / "out", *words, "--name", "first")
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert [path.name for path in after if before[path] != after[path]] == ["coffee.png"]
    again = {row["key"]: row for row in map(json.loads, (folder / "edits.jsonl").read_text().splitlines())}
    assert again.keys() == rows.keys()
    assert again["remove/coffee"]["psnr"] == pytest.approx(rows["remove/coffee"]["psnr"], rel=1e-2)
    with pytest.raises(SystemExit, match="results of other settings: seed is 0 there"):
        _evaluate(run, tmp_path / "out", *words, "--name", "first", "--seed", 1)
    photographs.rename(tmp_path / "others")
    photograph = (tmp_path / "others" / "astronaut.jpg").read_bytes()
    Image.fromarray(data.rocket()).save(tmp_path / "others" / "astronaut.jpg")
    with pytest.raises(SystemExit, match="other settings: data is '.*photographs' there"):
        _evaluate(run, tmp_path / "out", "--benchmark", "folder", "--data", tmp_path / "others", "--name", "first")
    (tmp_path / "others").rename(photographs)
    with pytest.raises(SystemExit, match="holds an edit recolor/astronaut of another picture"):
        _evaluate(run, tmp_path / "out", *words, "--name", "first")

    # Another editor of the same photographs, and both on one page.
    (photographs / "astronaut.jpg").write_bytes(photograph)
    _evaluate(run, tmp_path / "out", *words, "--name", "second, 50 % #2", "--raw")
    both = [str(tmp_path / "out" / name) for name in ("first", "second, 50 % #2")]
    for name in ("edits.jsonl", "answers.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"key": "recolor/astro')  # being written now: it is not for a reader to mend it
    evaluate.main(["--compare", *both, "--output", str(tmp_path / "out" / "pages" / "both.html")])
    assert all((folder / name).read_text().endswith("astro") for name in ("edits.jsonl", "answers.jsonl"))
    page = (tmp_path / "out" / "pages" / "both.html").read_text()
    links = re.findall(r'src="([^"]+)"', page)
    assert len(links) == 9
    assert all((tmp_path / "out" / "pages" / urllib.parse.unquote(link)).is_file() for link in links)
    assert not any(sign in link for link in links for sign in "# ?")
    assert "<td>second, 50 % #2</td>" in page and page.count("<figcaption>first") == 3
    # Two of one name are told apart by where they are.
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "second, 50 % #2")
    both[0] = str(tmp_path / "moved" / "second, 50 % #2")
    evaluate.main(["--compare", *both, "--output", str(tmp_path / "both.html")])
    assert f"<td>{both[0]}</td>" in (tmp_path / "both.html").read_text()


def test_gedit_with_grades(run, tmp_path, capsys, monkeypatch):
    write_gedit(tmp_path / "gedit", count=2)
    with serving(good) as server:
        grades = ("--vie-url", server.url, "--vie-model", "judge")
        words = ("--benchmark", "gedit", "--data", tmp_path / "gedit", "--languages", "en", "--original-size")
        _evaluate(run, tmp_path / "out", *words, "--name", "ours", *grades)
        asked = len(server.requests)
        _evaluate(run, tmp_path / "out", *words, "--name", "ours", *grades)
    assert asked == len(server.requests) == 8
    files = sorted(
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out" / "ours" / "fullset").rglob("*.png")
    )
    assert str(files[0]) == f"ours/fullset/style_change/en/{0:032x}.png" and len(files) == 4
    assert Image.open(tmp_path / "out" / files[0]).size == (20, 10)  # the photograph's own
    summary = json.loads((tmp_path / "out" / "ours" / "summary.json").read_text())["en"]
    assert summary["style_change"]["overall"] == pytest.approx(32**0.5) and summary["style_change"]["graded"] == 2
    assert "5.657" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="case fullset/.*/cn/.*: unknown words"):
        _evaluate(run, tmp_path / "out", "--benchmark", "gedit", "--data", tmp_path / "gedit", "--name", "chinese")


def test_dreambooth(run, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_dreambooth(tmp_path / "data")
    file = tmp_path / "data" / "prompts_and_classes.txt"
    words = {"stuffed animal": "circle", "in the jungle": "", "on a rug": "", "in a hat": "", "dog\n": "circle\n"}
    text = file.read_text()
    for old, new in words.items():  # words that the small tokenizer knows
        text = text.replace(old, new)
    file.write_text(text.replace("'a {0} {1} '", "'red {0} {1}'"))
    _evaluate(run, tmp_path / "out", "--benchmark", "dreambooth", "--data", tmp_path / "data", "--name", "ours")
    assert len(list((tmp_path / "out" / "ours").rglob("bear_plushie/0*.png"))) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--benchmark", "folder"), "needs --data"),
        (("--benchmark", "gedit", "--data", "."), "holds no parquet files"),
        (("--benchmark", "folder", "--data", "/nowhere"), "instructions.jsonl is not there"),
    ],
)
def test_bad_input_is_told_in_one_line(run, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^evaluate: [^\n]*{told}"):
        _evaluate(run, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_question_that_the_scorer_cannot_take_is_told_before_the_first_edit(run, photographs, tmp_path):
    lines = (photographs / "instructions.jsonl").read_text()
    more = {"image": "coffee.jpg", "key": "long", "instruction": "remove the circle " * 14}
    (photographs / "instructions.jsonl").write_text(f"{lines}\n{json.dumps(more)}")
    with pytest.raises(SystemExit, match="case all/long: the scorer's question .* is longer than 48 tokens"):
        _evaluate(run, tmp_path / "out", "--benchmark", "folder", "--data", photographs, "--batch", 1)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_nothing_to_edit_is_told(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "instructions.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="empty holds nothing to edit"):
        _evaluate(run, tmp_path / "out", "--benchmark", "folder", "--data", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "edits", "told"),
    [
        ('{"seed"', "", "settings.json is damaged"),
        ("[]", "", "no settings but a list"),
        ("{}", "[1]\n", "a line that is no edit"),
        ("{}", '{"key": "a"}\n', "a line that is no edit"),
    ],
)
def test_damaged_results_are_told(tmp_path, settings, edits, told):
    (tmp_path / "settings.json").write_text(settings)
    (tmp_path / "edits.jsonl").write_text(edits)
    with pytest.raises(ValueError, match=told):
        results.Results(tmp_path)


def test_results_begin_again_where_a_kill_left_half_of_their_settings(tmp_path):
    (tmp_path / ".settings.json.tmp").write_text('{"se')
    results.Results(tmp_path, {"seed": 0})
    assert results.Results(tmp_path).settings == {"seed": 0}


def test_edits_of_different_cases_are_not_put_side_by_side(tmp_path):
    picture, runs = Image.new("RGB", (8, 8)), []
    for name, case, instruction in (("a", 1, "remove the cup"), ("b", 1, "remove the cup"), ("c", 2, "make it blue")):
        runs.append(results.Results(tmp_path / name, {"seed": 0}))
        for key, digest in (("all/00001", case), ("all/00002", 7)):
            row = dict(key=key, task="all", part="", instruction=instruction if digest == case else "the same")
            runs[-1].add(row | dict(case=digest, seed=0), picture, picture)
    comparison.write(tmp_path / "page.html", runs[:2], "two")
    assert (tmp_path / "page.html").read_text().count("remove the cup") > 0
    comparison.write(tmp_path / "page.html", [runs[0], runs[2]], "two")
    text = (tmp_path / "page.html").read_text()
    assert "the same" in text and "remove the cup" not in text and "make it blue" not in text
    assert "1 more edits of a are of" in text and "1 more edits of c are of" in text
    assert comparison.write(tmp_path / "page.html", runs[:1], "one", ["all/00002"]) == {"a": 0}
    text = (tmp_path / "page.html").read_text()
    assert "the same" in text and "remove the cup" not in text and "more edits" not in text


class _Recorder:
    """An editor that notes the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def check(self, instruction):
        pass

    def fit(self, image):
        return np.asarray(image)

    def edit_batch(self, images, instructions, seeds, *, batch_size):
        self.sizes.append((images.shape[1], len(images), batch_size))
        return images


def test_a_few_pictures_of_a_rare_size_are_not_filled_up_to_a_batch(tmp_path):
    heights = [8] * 5 + [9] * 3 + [10]
    read = lambda height: lambda: Image.new("RGB", (8, height))  # noqa: E731
    asked = [cases.Case(f"all/{n}", "all", "make it blue", read(height)) for n, height in enumerate(heights)]
    editor = _Recorder()
    results.make(results.Results(tmp_path / "a", {}), editor, None, asked, seed=0, batch=4, original_size=False)
    assert editor.sizes == [(8, 4, 4), (8, 1, 4), (9, 3, 4), (10, 1, 1)]  # the second has a program already


def test_a_mask_that_leaves_nothing_is_told_before_its_batch_is_edited(tmp_path):
    picture = lambda: Image.new("RGB", (8, 8), "white")  # noqa: E731
    asked = [cases.Case(f"all/{n}", "all", "make it blue", picture, mask=[None, picture][n]) for n in range(2)]
    editor = _Recorder()
    with pytest.raises(ValueError, match="case all/1: the mask leaves nothing"):
        results.make(results.Results(tmp_path / "a", {}), editor, None, asked, seed=0, batch=4, original_size=False)
    assert not editor.sizes


def test_directory_that_holds_no_results_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds no results"):
        results.Results(tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        results.Results(tmp_path, {"seed": 0})
