"""The page as a visitor meets it: a real upload in headless Chromium, and what it must refuse.

DEMO_SCREENSHOT=FILE.png keeps the picture of the page, DEMO_CHECKPOINT=RUN shows that run's editor on it.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image
from skimage import data

from npedit_jax import demo
from npedit_jax.data import easyvqa
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


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    """The command, serving."""
    log = tmp_path_factory.mktemp("log") / "log"
    command = [sys.executable, "-m", "npedit_jax.demo", "--checkpoint", str(run)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ)
    deadline = time.monotonic() + 120
    while not (found := re.search(r"the page is at (http://\S+)", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield found[1].rstrip("/")
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


def test_no_file_of_the_machine_is_served(address, run):
    assert _status(address, "/") == 200
    for path in ("/etc/passwd", str(ROOT / "setup.py"), "setup.py", str(run / "config.json"), "../../../etc/passwd"):
        assert _status(address, f"/gradio_api/file={path}") in (403, 404), path


def test_upload_that_is_too_large_is_refused(address):
    def upload(size):
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body += bytes(size) + b"\r\n--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        return urllib.request.Request(f"{address}/gradio_api/upload", body, headers)

    assert urllib.request.urlopen(upload(1000), timeout=30).status == 200
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(upload(21_000_000), timeout=60)
    assert refused.value.code == 413


def test_pictures_and_words_that_cannot_be_used_are_told(run, tmp_path):
    editor = demo.Editor.from_checkpoint(run)
    page = demo.Demo(editor, None)
    good = tmp_path / "good.png"
    Image.new("RGB", (16, 16), "red").save(good)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (40_000, 40_000)).save(bomb)
    for file, words, told in [
        (None, "remove the circle", "Upload a picture"),
        (str(good), "  ", "Say what to do"),
        (str(good), "make the dog purple", "unknown words"),
        (str(bomb), "remove the circle", "pixels"),
        (str(run / "config.json"), "remove the circle", "no known format"),
    ]:
        with pytest.raises(ValueError, match=told):
            page.edit(file, words, 0)


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
