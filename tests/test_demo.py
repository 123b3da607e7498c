"""The page as a visitor meets it: a real upload in headless Chromium.

The picture of the page in the README, of a run's editor:

    DEMO_CHECKPOINT=runs/easyvqa DEMO_SCREENSHOT=docs/demo.png python -m pytest tests/test_demo.py -k visitor
"""

import os
import re
import shutil
import urllib.request

import pytest
from PIL import Image
from skimage import data

from npedit_jax import demo
from npedit_jax.data import easyvqa
from tests.demo_server import png, press, upload

pytest.importorskip("gradio")


def test_what_is_see_through_lies_on_white(demo_address):
    answer = press(demo_address, {"path": upload(demo_address, png(Image.new("RGBA", (64, 64), (255, 0, 0, 0))))})
    assert answer["success"], answer
    with urllib.request.urlopen(answer["output"]["data"][0][0]["url"], timeout=30) as file:
        assert Image.open(file).convert("RGB").getcolors()[0][1] == (255, 255, 255)


def test_pictures_and_words_that_cannot_be_used_are_told(demo_run, tmp_path):
    editor = demo.Editor.from_checkpoint(demo_run)
    page = demo.Demo(editor, demo.Judge.of_run(demo_run))
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
        (str(good), "remove the circle " * 14, 0, "the scorer's question"),
        (str(bomb), "remove the circle", 0, "pixels"),
        (str(demo_run / "config.json"), "remove the circle", 0, "no known format"),
    ]:
        with pytest.raises(ValueError, match=told):
            page.edit(file, words, seed)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium: apt-get install chromium")
def test_visitor_uploads_edits_and_looks_back(demo_address, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    pixels = easyvqa.load("test").images[0] if "DEMO_CHECKPOINT" in os.environ else data.astronaut()
    Image.fromarray(pixels).save(tmp_path / "in.png")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        outside = []
        page.on("request", lambda request: outside.append(request.url) if demo_address not in request.url else None)
        page.goto(demo_address)
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
