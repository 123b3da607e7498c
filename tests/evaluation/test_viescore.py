"""VIEScore against a stand-in endpoint: what is asked, how answers are read, retries, and going on after a failure."""

import base64
import io
import json
import math

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from npedit_jax.evaluation import viescore
from tests.evaluation.vie_server import good, serving


def _questions(count):
    pair = lambda: [Image.new("RGB", (1300, 20), "red"), Image.new("RGB", (30, 20), "blue")]  # noqa: E731
    return [
        viescore.Question(f"task/{n}", kind, f"make {{it}} {n}", pair if kind == "consistency" else lambda: pair()[1:])
        for n in range(count)
        for kind in viescore.KINDS
    ]


def _grader(server, tmp_path, **options):
    return viescore.Grader(server.url, "judge", "editing", tmp_path / "answers.jsonl", **options)


def test_grades_answers_and_pictures(tmp_path):
    with serving(good) as server:
        grader = _grader(server, tmp_path)
        grader.ask(_questions(3))
    found = viescore.scores(grader.answers(), "task/1")
    assert found == {"consistency": 4.0, "quality": 8.0, "overall": pytest.approx(math.sqrt(32))}
    assert len(server.requests) == 6 and server.requests[0]["model"] == "judge"
    texts = [request["messages"][0]["content"][-1]["text"] for request in server.requests]
    assert sum("make {it} 2" in text for text in texts) == 1  # the question about quality does not give it
    address = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert max(image.size) <= viescore.LARGEST
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all("Surely" in answer for row in rows for answer in row["answers"])


def test_customization_is_asked_about_the_subject(tmp_path):
    with serving(good) as server:
        viescore.Grader(server.url, "judge", "customization", tmp_path / "answers.jsonl").ask(_questions(1))
    texts = [request["messages"][0]["content"][-1]["text"] for request in server.requests]
    assert sum("the subject is the very same" in text and "make {it} 0" in text for text in texts) == 1


def test_an_answer_after_a_first_line_cut_short_is_kept(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"key": "task/0", "ki')
    with serving(good) as server:
        _grader(server, tmp_path).ask(_questions(1))
    assert len(server.requests) == 2
    assert len(viescore.read_answers(tmp_path / "answers.jsonl")) == 2


def test_what_is_answered_is_not_asked_again(tmp_path):
    with serving(good) as server:
        _grader(server, tmp_path).ask(_questions(2))
        with (tmp_path / "answers.jsonl").open("a") as file:
            file.write('{"key": "task/2", "ki')  # cut short by a crash
        _grader(server, tmp_path).ask(_questions(3))
    assert len(server.requests) == 6
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6


def test_failing_endpoint_is_tried_again_and_then_told(tmp_path):
    flaky = lambda number, content: (503, "busy") if number <= 2 else good(number, content)  # noqa: E731
    with serving(flaky) as server:
        _grader(server, tmp_path, workers=1).ask(_questions(1))
    assert len(server.requests) == 4
    with serving(lambda number, content: (401, "no such key") if number > 2 else good(number, content)) as server:
        grader = viescore.Grader(server.url, "judge", "editing", tmp_path / "other.jsonl", workers=1)
        with pytest.raises(openai.AuthenticationError, match="no such key"):
            grader.ask(_questions(3))
    assert len((tmp_path / "other.jsonl").read_text().splitlines()) == 2


def test_answer_without_grades_is_asked_for_again_and_counts_as_none(tmp_path):
    with serving(lambda number, content: (200, f"I would rather not say, {number}.")) as server:
        grader = _grader(server, tmp_path, workers=1)
        grader.ask(_questions(1))
    assert len(server.requests) == 2 * viescore.ATTEMPTS
    assert viescore.scores(grader.answers(), "task/0") == {}
    kept = [answer for row in grader.answers().values() for answer in row["answers"]]
    assert kept == [f"I would rather not say, {number}." for number in range(1, 1 + 2 * viescore.ATTEMPTS)]


def test_answers_of_another_model_are_not_gone_on_with(tmp_path):
    with serving(good) as server:
        _grader(server, tmp_path).ask(_questions(1))
        with pytest.raises(ValueError, match="has answers of judge: .* move the file away"):
            viescore.Grader(server.url, "other", "editing", tmp_path / "answers.jsonl")


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"{}", b'{"choices": []}', b'{"choices": null}', b"[1]"])
def test_what_is_no_chat_completion_is_told(tmp_path, body):
    with serving(lambda number, content: (200, body)) as server, pytest.raises(ValueError, match="no chat completion"):
        _grader(server, tmp_path, workers=1).ask(_questions(1))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"score": [7, 8.5], "reasoning": "{odd} words"}', [7.0, 8.5]),
        ('<think>{"score": 3}</think> {"score": [0, 10]}', [0.0, 10.0]),
        ('{"score": [7]}', None),
        ('{"score": [7, 11]}', None),
        ('{"score": ["7", 8]}', None),
        ('{"score": [true, 8]}', None),
        ('{"score": [NaN, 8]}', None),
        ("", None),
    ],
)
def test_reading_of_grades(answer, expected):
    assert viescore.grades(answer) == expected


@given(st.text() | st.builds(lambda x: json.dumps({"score": x}), st.recursive(st.none() | st.floats(), st.lists)))
def test_any_answer_gives_grades_in_range_or_none(answer):
    found = viescore.grades(answer)
    assert found is None or (len(found) == 2 and all(0 <= x <= 10 for x in found))


def test_what_a_model_refuses_is_left_out(tmp_path):
    """As models do that reason before they answer: no temperature, and another name for the limit."""

    def strict(number, content):
        for name in ("max_tokens", "temperature"):
            if name in server.requests[number - 1]:
                return 400, {"message": f"Unsupported parameter: '{name}'", "param": name}
        return good(number, content)

    with serving(strict) as server:
        grader = _grader(server, tmp_path, workers=1)
        grader.ask(_questions(1))
    assert viescore.scores(grader.answers(), "task/0")["quality"] == 8.0
    assert not {"max_tokens", "temperature"} & server.requests[2].keys() and len(server.requests) == 6
    with serving(lambda number, content: (400, {"message": "no such model", "param": "model"})) as server:
        with pytest.raises(openai.BadRequestError, match="no such model"):
            viescore.Grader(server.url, "x", "editing", tmp_path / "others.jsonl").ask(_questions(1))


@pytest.mark.parametrize("grades", ["3", "[3]", '"89"', '["a", "b"]', "[[1], [2]]"])
def test_a_line_with_no_grades_is_no_answer(tmp_path, grades):
    file = tmp_path / "answers.jsonl"
    file.write_text(f'{{"key": "task/0", "kind": "quality", "model": "judge", "grades": {grades}}}\n')
    assert not viescore.read_answers(file)
    file.write_text('{"key": "task/0", "kind": "quality", "model": "judge", "grades": null}\n')
    assert len(viescore.read_answers(file)) == 1
