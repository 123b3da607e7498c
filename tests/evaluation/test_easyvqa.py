"""The easy-VQA benchmark: its requests, its figures, and the scorer's answers about edits."""

import collections
import json

import jax
import numpy as np
import pytest

from npedit_jax import evaluate, weights
from npedit_jax.data import easyvqa as dataset
from npedit_jax.data import easyvqa_edits, questions
from npedit_jax.data.tokenize import ScorerTokenizer
from npedit_jax.evaluation import easyvqa
from npedit_jax.judge import Judge
from npedit_jax.training import networks
from tests.tiny_editor import SCORER


@pytest.fixture(scope="module")
def data():
    return dataset.load("test")


@pytest.fixture(scope="module")
def asked(data):
    return easyvqa.requests(data, seed=0)


class HandEditor:
    """Carries out by hand what it can look up by image and instruction, and remembers what it was called with."""

    def __init__(self, data, asked):
        self.edits = {(data.images[x.index].tobytes(), x.edit.instruction): x.edit for x in asked}
        self.batches, self.seeds = [], []

    def edit_batch(self, images, instructions, seeds):
        self.batches.append(len(images))
        self.seeds += seeds
        edits = [self.edits[image.tobytes(), text] for image, text in zip(images, instructions, strict=True)]
        return np.stack([easyvqa_edits.apply(image, edit) for image, edit in zip(images, edits, strict=True)])


def test_every_image_is_edited_once_in_each_way(data, asked):
    assert len(asked) == 4 * len(data) == 4000
    pairs = collections.Counter((request.index, request.edit.edit_type) for request in asked)
    assert set(pairs.values()) == {1}
    assert all(request.edit.source == data.shapes[request.index] for request in asked)
    kinds = collections.Counter(x.edit.target.kind for x in asked if x.edit.edit_type == "replace")
    assert set(kinds) == set(dataset.CLASSES) and min(kinds.values()) > 250
    assert len({x.edit.instruction for x in asked if x.edit.edit_type == "remove"}) > 30


def test_requests_follow_from_the_seed_and_the_image_alone(data, asked):
    assert easyvqa.requests(data, seed=0) == asked
    assert easyvqa.requests(data.fraction(0.1), seed=0) == asked[:400]
    assert easyvqa.requests(data, seed=1) != asked


def test_edits_by_hand_reach_all_of_it(data, asked):
    edited = easyvqa.edit_all(HandEditor(data, asked).edit_batch, data, asked, seed=0, batch=128)
    summary = easyvqa.summarise(easyvqa.score(data, asked, edited))
    assert tuple(summary) == dataset.EDIT_TYPES
    for name, figures in easyvqa.table_rows(summary):
        assert figures["done"] == figures["done_kept"] == 100, name
        assert figures["kept_error"] < 0.1, name
        assert figures["count"] == 1000 or " with a " in name
    assert sum(part["count"] for part in summary["replace"]["targets"].values()) == 1000


def test_what_the_scorer_thinks_of_edits_that_are_done_and_of_others():
    score = lambda done, answer: dict(edit_type="recolor", done=done, kept_error=1.0, scorer_edit=answer)  # noqa: E731
    figures = easyvqa.summarise([score(True, 0.9), score(True, 0.7), score(False, 0.25)])["recolor"]
    assert figures["scorer_done"] == pytest.approx(0.8) and figures["scorer_not_done"] == pytest.approx(0.25)
    assert "scorer_not_done" not in easyvqa.summarise([score(True, 0.9)])["recolor"]
    without = [{name: value for name, value in score(True, 0.9).items() if name != "scorer_edit"}]
    assert "scorer_done" not in easyvqa.summarise(without)["recolor"]


def test_copies_do_nothing_and_nothing_else(data, asked):
    data, asked = data.fraction(0.4), asked[:1600]
    edited = easyvqa.edit_all(lambda images, texts, seeds: images, data, asked, seed=0, batch=100)
    np.testing.assert_array_equal(edited, data.images[[request.index for request in asked]])
    summary = easyvqa.summarise(easyvqa.score(data, asked, edited))
    assert summary["nothing"]["done_kept"] == 100 and summary["nothing"]["kept_error"] == 0
    assert max(summary[edit_type]["done"] for edit_type in ("recolor", "remove", "replace")) <= 1


def test_batches_have_one_size_and_leave_no_trace(data, asked):
    few, results = asked[:10], []
    for batch in (3, 4, 16):
        editor, finished = HandEditor(data, asked), []
        results.append(easyvqa.edit_all(editor.edit_batch, data, few, seed=5, batch=batch, advance=finished.append))
        assert set(editor.batches) == {batch} and sum(finished) == 10
        assert len(set(editor.seeds[:10])) == 10
        results[-1] = (results[-1], editor.seeds[:10])
    for edited, seeds in results[1:]:
        np.testing.assert_array_equal(edited, results[0][0])
        assert seeds == results[0][1]


def test_figures_of_scores_counted_by_hand():
    def item(edit_type, done, kept_error, kind=None):
        return {"edit_type": edit_type, "done": done, "kept_error": kept_error, "target": {"kind": kind}}

    scores = [item("recolor", True, 8.0), item("recolor", True, 8.5), item("recolor", False, 0.0)]
    scores += [item("replace", True, 1.0, "circle"), item("replace", False, 3.0, "triangle")]
    summary = easyvqa.summarise(scores)
    assert tuple(summary) == ("recolor", "replace")
    assert summary["recolor"] == pytest.approx({"count": 3, "done": 200 / 3, "done_kept": 100 / 3, "kept_error": 5.5})
    assert summary["replace"]["kept_error"] == 2.0
    assert {kind: part["done"] for kind, part in summary["replace"]["targets"].items()} == {
        "circle": 100,
        "triangle": 0,
    }
    assert "recolor" in easyvqa.table(summary) and "66.7" in easyvqa.table(summary)


def test_the_scorer_answers_each_edit_in_its_own_right(data, asked):
    module = weights.build("internvl", SCORER)
    params = networks.initialise("internvl", module, jax.random.key(0))
    directory = networks.resolve("package:pretrained/easyvqa/scorer")
    tokenizer = ScorerTokenizer(directory, module.image_tokens, length=48)
    references, edits = data.images[[x.index for x in asked[:7]]], [x.edit for x in asked[:7]]
    edited = data.images[10:17]

    def ask(references, edited, edits, batch):
        judge = Judge(networks.Network(module, params), tokenizer, questions.EASYVQA)
        pairs = [judge.questions(edit.instruction, edit.edit_type, edit.object) for edit in edits]
        return judge(references, edited, pairs, batch=batch)

    alone = ask(references, edited, edits, 7)
    assert alone.shape == (7, 2) and (alone > 0).all() and (alone < 1).all() and np.ptp(alone) > 1e-3
    both = ask(np.concatenate([references, data.images[20:27]]), np.concatenate([edited, edited]), edits * 2, 4)
    np.testing.assert_allclose(both[:7], alone, atol=1e-5)
    for edit, first, second in zip(edits, both[:7], both[7:], strict=True):
        # After a removal the edit question shows the edit alone, so that another reference changes nothing.
        assert (abs(first - second) > 1e-6).tolist() == [edit.edit_type != "remove", True], edit


@pytest.fixture
def run(tmp_path, data, asked, monkeypatch):
    """A directory that passes for a run, of an editor that edits by hand."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"seed": 0, "networks": {"student": {}}}))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    monkeypatch.setattr(evaluate.Editor, "from_checkpoint", lambda run, *, raw=False: HandEditor(data, asked))
    return tmp_path / "run"


def test_command_writes_scores_summary_and_report(run, tmp_path, capsys):
    output = tmp_path / "evaluation"
    arguments = ["--checkpoint", str(run), "--benchmark", "easyvqa", "--output", str(output)]
    evaluate.main([*arguments, "--limit", "6", "--report", str(tmp_path / "pages" / "report.html")])
    scores, summary = (json.loads((output / name).read_text()) for name in ("scores.json", "summary.json"))
    assert len(scores) == 24 and summary["images"] == 6
    assert summary["edits"] == easyvqa.summarise(scores)
    assert capsys.readouterr().out.strip() == easyvqa.table(summary["edits"])
    assert "<svg" in (tmp_path / "pages" / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--benchmark": "imagenet"}, "unknown benchmark 'imagenet'"),
        ({"--checkpoint": "/nowhere"}, "/nowhere is no run"),
    ],
)
def test_command_refuses_in_one_line_and_writes_nothing(run, tmp_path, change, message, capsys):
    output = tmp_path / "evaluation"
    given = {"--checkpoint": str(run), "--benchmark": "easyvqa", "--output": str(output)} | change
    with pytest.raises(SystemExit, match=message) as caught:
        evaluate.main([word for pair in given.items() for word in pair])
    # A string as exit code is printed, and the process ends with 1.
    assert "\n" not in caught.value.code and not output.exists()
