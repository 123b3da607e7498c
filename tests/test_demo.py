"""The page as a visitor meets it: a real upload in headless Chromium, and what it must refuse.

The picture of the page in the README, of a run's editor:

    DEMO_CHECKPOINT=runs/easyvqa DEMO_SCREENSHOT=docs/demo.png python -m pytest tests/test_demo.py -k visitor
"""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid

import pytest
from PIL import Image
from skimage import data

from npedit_jax import demo
from npedit_jax.data import easyvqa
from tests.evaluation.vie_server import serving
from tests.faults.command import ROOT
from tests.tiny_editor import write_run

pytest.importorskip("gradio")
SAMPLING = dict(times=(1.0, 0.75, 0.5, 0.25), sampler="ddim", eta=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if trained := os.environ.get("DEMO_CHECKPOINT"):
        return pathlib.Path(trained).resolve()
    root = tmp_path_factory.mktemp("demo")
    return write_run(root, "package:pretrained/easyvqa/text_encoder", SAMPLING, scorer=True)


def _start(run, log, environment=None):
    """The command once it serves, and its address."""
    command = [sys.executable, "-m", "npedit_jax.demo", "--checkpoint", str(run)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
        )
    deadline = time.monotonic() + 120
    while not (found := re.search(r"the page is at (http://\S+)", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return process, found[1].rstrip("/")


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    process, address = _start(run, tmp_path_factory.mktemp("log") / "log")
    yield address
    process.terminate()
    process.wait(30)


def _status(address: str, path: str) -> int:
    try:
        with urllib.request.urlopen(address + path, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_listens_on_this_machine_alone(address):
    assert address.startswith("http://127.0.0.1:")
    port = int(address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):  # as any other address of the machine
        socket.create_connection(("127.0.0.2", port), timeout=10)


def test_no_file_of_the_machine_is_served(address, run):
    assert _status(address, "/") == 200
    for path in ("/etc/passwd", str(ROOT / "setup.py"), "setup.py", str(run / "config.json"), "../../../etc/passwd"):
        assert _status(address, f"/gradio_api/file={path}") in (403, 404), path


def _upload(address: str, data: bytes) -> str:
    """Where the server has put a file."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + data + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)[0]


def _post(address: str, path: str, body: bytes) -> int:
    request = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60).status


def _edit(address: str, picture: dict[str, str], words: str = "remove the circle") -> dict:
    """What the server answers to the button, pressed without a browser."""
    session = uuid.uuid4().hex
    picture = picture | {"meta": {"_type": "gradio.FileData"}}
    event = {"data": [picture, words, 0, False, None], "fn_index": 0, "session_hash": session}
    assert _post(address, "/gradio_api/queue/join", json.dumps(event).encode()) == 200
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data:") and (found := json.loads(line[5:]))["msg"] == "process_completed":
                return found
    raise AssertionError("no answer")


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def test_upload_that_is_too_large_is_refused(address):
    assert _upload(address, bytes(1000))
    with pytest.raises(urllib.error.HTTPError, match="413"):
        _upload(address, bytes(20_500_000))
    with pytest.raises(urllib.error.URLError) as refused:  # a picture within the words that are sent
        _post(address, "/gradio_api/queue/join", b'{"data": ["data:image/png;base64,' + b"A" * 25_000_000 + b'"]}')
    # The answer, or the connection's end before all is sent.
    assert getattr(refused.value, "code", 413) == 413 and _status(address, "/") == 200


def test_picture_with_too_many_pixels_is_told(address):
    answer = _edit(address, {"path": _upload(address, _png(Image.new("1", (9000, 9000))))})
    assert not answer["success"] and "more than 67108864 pixels" in answer["output"]["error"]


def test_what_is_see_through_lies_on_white(address):
    answer = _edit(address, {"path": _upload(address, _png(Image.new("RGBA", (64, 64), (255, 0, 0, 0))))})
    assert answer["success"], answer
    with urllib.request.urlopen(answer["output"]["data"][0][0]["url"], timeout=30) as file:
        assert Image.open(file).convert("RGB").getcolors()[0][1] == (255, 255, 255)


def test_only_what_was_uploaded_is_edited(address, tmp_path):
    """Neither a file of the machine nor an address that it can reach."""
    (tmp_path / "secret.png").write_bytes(_png(Image.new("RGB", (64, 64), "red")))
    with serving(lambda number, content: (200, "")) as other:
        inside = other.url.removesuffix("/v1") + "/secret.png"
        for picture in (
            {"path": str(tmp_path / "secret.png")},
            {"path": inside},
            {"path": inside, "url": inside},
            {"path": f"{_upload(address, b'x')}/../../../../../../..{tmp_path}/secret.png"},
        ):
            assert not _edit(address, picture)["success"], picture
        assert other.requests == [] and other.paths == []


def test_its_folder_is_gone_when_it_is_ended(run, tmp_path):
    process, _ = _start(run, tmp_path / "log", {"TMPDIR": str(tmp_path)})
    assert list(tmp_path.glob("npedit-demo-*"))
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("npedit-demo-*"))


def test_pictures_and_words_that_cannot_be_used_are_told(run, tmp_path):
    editor = demo.Editor.from_checkpoint(run)
    page = demo.Demo(editor, None)
    good = tmp_path / "good.png"
    Image.new("RGB", (16, 16), "red").save(good)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (40_000, 40_000)).save(bomb)
    for file, words, seed, told in [
        (None, "remove the circle", 0, "Upload a picture"),
        (str(good), "  ", 0, "Say what to do"),
        (str(good), "remove the circle", None, "Give a seed"),
        (str(good), "remove the circle", -1, "from 0 to"),
        (str(good), "make the dog purple", 0, "unknown words"),
        (str(bomb), "remove the circle", 0, "pixels"),
        (str(run / "config.json"), "remove the circle", 0, "no known format"),
    ]:
        with pytest.raises(ValueError, match=told):
            page.edit(file, words, seed)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium: apt-get install chromium")
def test_visitor_uploads_edits_and_looks_back(address, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    pixels = easyvqa.load("test").images[0] if "DEMO_CHECKPOINT" in os.environ else data.astronaut()
    Image.fromarray(pixels).save(tmp_path / "in.png")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        outside = []
        page.on("request", lambda request: outside.append(request.url) if address not in request.url else None)
        page.goto(address)
        page.locator("#picture input[type=file]").set_input_files(str(tmp_path / "in.png"))
        page.locator("#picture img").wait_for(timeout=60_000)
        words = page.locator("#scores textarea, #scores input")
        for number, instruction in enumerate(["make the circle red", "remove the circle"], start=1):
            page.locator("#instruction textarea, #instruction input").fill(instruction)
            page.locator("#edit").click()
            page.locator("#history").get_by_text(instruction).or_(
                page.locator(f"#history img >> nth={number - 1}")
            ).first.wait_for(timeout=120_000)
            sync_api.expect(words).to_have_value(
                re.compile(r"done \d\.\d\d · rest kept \d\.\d\d · seed 0"), timeout=60_000
            )
        assert page.locator("#result img").count() == 2 and page.locator("#history img").count() == 2
        page.wait_for_function(
            "() => [...document.querySelectorAll('#result img, #history img')].every(x => x.naturalWidth >= 256)"
        )
        page.screenshot(path=os.environ.get("DEMO_SCREENSHOT", str(tmp_path / "page.png")))
        page.locator("#instruction textarea, #instruction input").fill("make the dog purple")
        page.locator("#edit").click()
        page.get_by_text("unknown words: dog, purple").first.wait_for(timeout=60_000)
        browser.close()
    assert [url for url in outside if not url.startswith(("data:", "blob:"))] == []
