"""Writing of instructions, against a stand-in for the model's server."""

import base64
import collections
import concurrent.futures
import contextlib
import http.server
import io
import json
import re
import threading
import time

import openai
import pytest
from PIL import Image

from npedit_jax.data import instructions, records, select
from npedit_jax.data.instructions import Asker, InvalidAnswer, NoEdit
from tests.data import record_sets

GOOD = dict(
    input_caption="a cat on a sofa",
    object="the cat",
    instruction="Remove the cat from the sofa.",
    edited_caption="a sofa",
)


class Server:
    """A server of the OpenAI chat API on the loopback address that answers by `reply(request number, messages)`.

    A reply is the text of the answer, a status to fail with, a body to send as it is, or None to hang for a second.
    """

    def __init__(self, reply):
        self.requests = []
        outer, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    answer = reply(len(outer.requests), body["messages"])
                if answer is None:
                    time.sleep(1.0)
                status = answer if isinstance(answer, int) else 200
                message = {"role": "assistant", "content": answer}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                reply_body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                if isinstance(answer, bytes):
                    data = answer
                else:
                    data = json.dumps({"error": "busy"} if status != 200 else reply_body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client gave up
                    self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self.client = openai.OpenAI(base_url=address, api_key="none", max_retries=3, timeout=10)
        self.address = address

    def close(self):
        self.client.close()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Twelve images without texts; the last one has an instruction."""
    made = record_sets.photograph_records(12)
    for number in range(12):
        texts = dict(instruction="", edited_caption="", input_caption="", object="", edit_type="")
        record_sets.changed(made, number, **texts)
    record_sets.changed(made, 11, instruction="make it night", edit_type="style")
    return record_sets.write(tmp_path_factory.mktemp("bare") / "bare", made)


def answers_of(output) -> list[tuple[int, dict]]:
    return list(instructions._read_answers(output / instructions.ANSWERS))


def asked(request) -> str:
    return request["messages"][0]["content"][1]["text"]


def test_every_record_gets_its_texts(serve, bare, tmp_path):
    server = serve(lambda number, messages: json.dumps(GOOD))
    shares = {"remove": 1.0, "style": 1.0}
    written = instructions.run(bare, tmp_path, Asker(server.client, "vlm"), shares=shares, concurrency=3)
    assert len(server.requests) == 12 and len(written) == 12
    for number in range(11):
        record = written[number]
        assert {field: getattr(record, field) for field in instructions.FIELDS} == GOOD
        assert record.edit_type in shares and record.image == bare[number].image and record.id == bare[number].id
    last = written[11]
    assert (last.instruction, last.edit_type, last.edited_caption) == ("make it night", "style", "a sofa")
    kinds = collections.Counter(written[number].edit_type for number in range(11))
    assert len(kinds) == 2
    for request in server.requests:
        image = request["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(image))).size in {(96, 96), (96, 160), (160, 96)}
        assert request["model"] == "vlm"
    texts = [asked(request) for request in server.requests]
    assert sum("make it night" in text for text in texts) == 1
    assert sum(instructions.KINDS["remove"] in text for text in texts) == kinds["remove"]


def test_records_that_stay_left_out_are_not_paid_for(serve, tmp_path):
    nothing = dict(instruction="", edited_caption="", input_caption="", edit_type="")
    made = record_sets.photograph_records(7)
    for number, changes in enumerate([nothing, nothing, nothing | {"width": 40}, {"edit_type": "zoom_in"}, {}, {}]):
        record_sets.changed(made, number, **{"edited_caption": "", "edit_type": "style"} | changes)
    record_sets.changed(made, 1, image=made[0].image)
    record_sets.changed(made, 5, image=made[4].image, instruction=made[4].instruction)
    found = record_sets.write(tmp_path / "all", made)
    server = serve(lambda number, messages: json.dumps(GOOD))
    for filters, asked_about, used in (
        (select.Filters(min_side=64), [0, 4], [0, 4, 6]),
        (select.Filters(min_side=64, known_edit_types=False), [0, 3, 4], [0, 3, 4, 6]),
        (select.Filters(min_side=64, instruction=False), [0, 4], [0, 4, 6]),
    ):
        select.apply(tmp_path / "all", filters)
        found = records.Records(tmp_path / "all")
        output = tmp_path / f"to {len(server.requests)}"
        written = instructions.run(found, output, Asker(server.client, "vlm"), shares={"remove": 1.0})
        assert sorted(number for number, _ in answers_of(output)) == asked_about
        assert written.kept().tolist() == used
        assert [written[number].edit_type for number in (0, 3, 4)] == ["remove", "zoom_in", "style"]


def test_removals_without_an_object_are_given_one(serve, tmp_path):
    made = record_sets.photograph_records(4, edit_types=("remove",))
    for number in (1, 2, 3):
        record_sets.changed(made, number, object="")
    record_sets.changed(made, 2, image=made[1].image, instruction=made[1].instruction)  # a duplicate
    record_sets.changed(made, 3, edit_type="style")
    found = record_sets.write(tmp_path / "all", made)
    select.apply(tmp_path / "all", select.Filters(min_side=64))
    found = records.Records(tmp_path / "all")
    assert found.manifest["left_out"]["no_object"] == 2
    server = serve(lambda number, messages: json.dumps(GOOD))
    written = instructions.run(found, tmp_path / "out", Asker(server.client, "vlm"), shares={"remove": 1.0})
    assert [number for number, _ in answers_of(tmp_path / "out")] == [1]
    assert written.kept().tolist() == [0, 1, 3]
    assert (written[1].object, written[1].instruction) == (GOOD["object"], made[1].instruction)


def test_an_interrupt_asks_no_more_and_keeps_what_is_answered(serve, bare, tmp_path, monkeypatch):
    cancelled, wait = threading.Event(), concurrent.futures.wait

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            cancelled.set()
            super().shutdown(wait)

    def interrupted(*arguments, **options):
        wait(*arguments, **options)
        raise KeyboardInterrupt

    def reply(number, messages):
        assert number == 1 or cancelled.wait(60)
        return json.dumps(GOOD)

    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(concurrent.futures, "wait", interrupted)
    server = serve(reply)
    with pytest.raises(KeyboardInterrupt):  # of four requests one is answered, two are on their way
        instructions.run(bare, tmp_path, Asker(server.client, "vlm"), shares={"remove": 1.0}, concurrency=2)
    assert len(answers_of(tmp_path)) == len(server.requests) == 3


def test_failures_are_retried_and_bad_answers_asked_for_again(serve, bare):
    replies = [503, "no JSON", json.dumps({**GOOD, "object": ""}), 500, json.dumps(GOOD)]
    server = serve(lambda number, messages: replies[number - 1])
    assert Asker(server.client, "vlm")(bare[0], "remove") == GOOD
    assert len(server.requests) == 5
    assert "it is no JSON object" in server.requests[2]["messages"][-1]["content"]
    assert "object is empty" in server.requests[4]["messages"][-1]["content"]
    assert len(server.requests[4]["messages"]) == 3  # the first question and the last answer alone
    hopeless = serve(lambda number, messages: "never")
    with pytest.raises(InvalidAnswer, match="no JSON"):
        Asker(hopeless.client, "vlm", tries=2)(bare[0], "remove")
    assert len(hopeless.requests) == 2


def test_resumes_without_asking_twice(serve, bare, tmp_path):
    def reply(number, messages):
        return json.dumps(GOOD) if number <= 5 else 401

    broken = serve(reply)
    with pytest.raises(openai.OpenAIError):
        instructions.run(bare, tmp_path, Asker(broken.client, "vlm"), shares={"remove": 1.0}, concurrency=1)
    assert [number for number, _ in answers_of(tmp_path)] == list(range(5))
    with (tmp_path / instructions.ANSWERS).open("a") as file:
        file.write('{"number": 5, "edit_ty')  # a write that an outage cut
    with (tmp_path / instructions.ANSWERS).open("ab") as file:
        file.write('\n{"number": 5, "object": "the café'.encode()[:-1])  # and one within a letter
    (tmp_path / bare.manifest["shards"][0]["file"]).write_bytes(b"a shard, but the run was stopped before the next")
    server = serve(lambda number, messages: json.dumps(GOOD | {"edited_caption": "second run"}))
    written = instructions.run(bare, tmp_path, Asker(server.client, "vlm"), shares={"remove": 1.0}, concurrency=2)
    captions = [written[number].edited_caption for number in range(12)]
    assert captions == ["a sofa"] * 5 + ["second run"] * 7 and len(server.requests) == 7


def test_answers_are_not_taken_for_those_of_another_run(serve, bare, tmp_path, monkeypatch):
    server = serve(lambda number, messages: json.dumps(GOOD))
    same = dict(found=bare, ask=Asker(server.client, "vlm"), shares={"remove": 1.0, "style": 1.0}, seed=0)
    instructions.run(output=tmp_path / "out", **same)
    other = record_sets.write(tmp_path / "other", [bare[number] for number in range(1, 12)])
    changes = dict(found=other, ask=Asker(server.client, "llm"), shares={"style": 1.0, "remove": 1.0}, seed=1)
    for name, told in dict(found="records", ask="model vlm and not llm", shares="shares", seed="seed 0").items():
        with pytest.raises(ValueError, match=f"answers.jsonl holds answers for {told}.*give another --output"):
            instructions.run(output=tmp_path / "out", **same | {name: changes[name]})
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="for prompts"):
        patch.setattr(instructions, "_NEW", "another question {kind}")
        instructions.run(output=tmp_path / "out", **same)
    instructions.run(output=tmp_path / "out", **same)
    assert len(server.requests) == 12


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>gateway</html>",
        b'{"choices": [',
        b"{}",
        b"[1]",
        b"null",
        b'"text"',
        b'{"choices": []}',
        b'{"choices": null}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"content": ["x"]}}]}',
    ],
)
def test_a_reply_that_is_no_completion_is_asked_for_again(serve, bare, body):
    server = serve(lambda number, messages: body if number == 1 else json.dumps(GOOD))
    assert Asker(server.client, "vlm")(bare[0], "remove") == GOOD
    assert len(server.requests) == 2 and len(server.requests[1]["messages"]) == 1
    hopeless = serve(lambda number, messages: body)
    with pytest.raises(InvalidAnswer):
        Asker(hopeless.client, "vlm", tries=2)(bare[0], "remove")


def test_a_server_that_hangs_and_fails_now_and_then_costs_no_record(serve, bare, tmp_path):
    """A third of the replies fail in one way or another; one record's request is refused every time."""
    trouble = [500, b"not json", json.dumps(GOOD | {"object": "\ud800"}), "", 429, None, "[" * 100_000, b"{}"]

    def reply(number, messages):
        if "make it night" in messages[0]["content"][1]["text"]:
            return 400
        return trouble[number // 3 % len(trouble)] if number % 3 == 0 else json.dumps(GOOD)

    server = serve(reply)
    ask = Asker(server.client.with_options(timeout=0.5), "vlm", tries=5)
    written = instructions.run(bare, tmp_path, ask, shares={"remove": 1.0}, concurrency=4)
    assert [written[number].edited_caption for number in range(12)] == ["a sofa"] * 11 + [""]
    assert sorted(number for number, _ in answers_of(tmp_path)) == list(range(11))


def test_a_set_is_there_with_its_filters_or_not_at_all(serve, bare, tmp_path, monkeypatch):
    server = serve(lambda number, messages: json.dumps(GOOD))
    monkeypatch.setattr(instructions.select, "save", lambda *arguments, filters: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        instructions.run(bare, tmp_path, Asker(server.client, "vlm"), shares={"remove": 1.0})
    assert not (tmp_path / records.MANIFEST).exists()


def test_an_endpoint_that_refuses_everything_ends_the_run_and_is_asked_again(serve, bare, tmp_path, monkeypatch):
    monkeypatch.setattr(instructions, "_REFUSALS", 5)
    server = serve(lambda number, messages: 400)
    with pytest.raises(openai.BadRequestError):
        instructions.run(bare, tmp_path, Asker(server.client, "vlm"), shares={"remove": 1.0}, concurrency=1)
    assert len(server.requests) < 12 and answers_of(tmp_path) == []
    assert not (tmp_path / records.MANIFEST).exists()


def test_records_without_a_usable_answer_stay_without_texts(serve, bare, tmp_path):
    none = json.dumps(GOOD | {"instruction": "NONE"})
    server = serve(lambda number, messages: none if number % 2 else "nonsense")
    written = instructions.run(
        bare, tmp_path, Asker(server.client, "vlm", tries=1), shares={"text": 1.0}, concurrency=1
    )
    assert [written[number].instruction for number in range(11)] == [""] * 11
    assert written.manifest["left_out"]["no_instruction"] == 11 or written.manifest["kept"] == 0
    problems = [answer["problem"] for _, answer in answers_of(tmp_path)]
    assert {problem.split(":")[0] for problem in problems} == {"NoEdit", "InvalidAnswer"}


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"instruction": ""}, "instruction is empty"),
        ({"instruction": "x" * 301}, "longer than 300"),
        ({"edited_caption": "a cat on a sofa"}, "change nothing"),
        ({"instruction": "Remove the dog."}, "does not name the object"),
        ({"object": None}, "needs the texts"),
    ],
)
def test_checks(changes, complaint):
    assert instructions.check(f"```json\n{json.dumps(GOOD)}\n```", "remove") == GOOD
    with pytest.raises(InvalidAnswer, match=complaint):
        instructions.check(json.dumps(GOOD | changes), "remove")
    for text in ("[]", "3", "", '{"instruction": "x"}'):
        with pytest.raises(InvalidAnswer):
            instructions.check(text, "remove")
    with pytest.raises(NoEdit):
        instructions.check(json.dumps(GOOD | {"instruction": "none."}), "text")


def test_command(serve, bare, tmp_path, monkeypatch, capsys):
    server = serve(lambda number, messages: json.dumps(GOOD))
    arguments = ["--records", str(bare.directory), "--endpoint", server.address, "--model", "vlm"]
    monkeypatch.setattr("sys.argv", ["instructions", *arguments, "--output", str(tmp_path / "out")])
    assert instructions.main() == 0
    assert "12 records kept" in capsys.readouterr().out or len(records.Records(tmp_path / "out")) == 12
    assert instructions.main() == 1 and "finished records" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["instructions", *arguments, "--output", str(tmp_path / "other"), "--tries=0"])
    assert instructions.main() == 1 and "--tries must be 1 or more; found 0" in capsys.readouterr().err
    for wrong in ("zoom=1", "remove", "remove=", "remove=1,,", "remove=-1,style=2", "remove=0", "remove=nan"):
        other = ["--edit-types", wrong, "--output", str(tmp_path / "other")]
        monkeypatch.setattr("sys.argv", ["instructions", *arguments, *other])
        assert instructions.main() == 1
        told = "no description of" if wrong == "zoom=1" else f"--edit-types takes NAME=SHARE,.*found '{wrong}'"
        assert re.search(told, capsys.readouterr().err)
