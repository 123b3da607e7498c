"""The documentation's commands: those that need no long training run, and all others name what exists."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import config_flags
from PIL import Image
from skimage import data

import npedit_jax
from npedit_jax import demo
from tests.evaluation.test_cases import write_dreambooth, write_gedit
from tests.evaluation.vie_server import good, serving
from tests.tiny_editor import write_run

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Entry points that run here as the page says; of the others the options are looked up.
RUN = ("edit", "evaluate", "export", "demo")
SAMPLING = dict(times=(1.0, 0.5), sampler="ddim", eta=1.0)


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words of every `python -m npedit_jax...` in the page's code blocks."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ *(?:[A-Z_]+=\S+ +)*python -m (npedit_jax\.[^#\n`]+)", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


ALL = [(page, words) for page in PAGES for words in commands(page)]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder with what the pages speak of: a run, photographs, benchmarks, a model behind an address."""
    folder = tmp_path_factory.mktemp("docs")
    write_run(folder, "package:pretrained/easyvqa/text_encoder", SAMPLING, scorer=True, buckets=((16, 16), (12, 20)))
    for name in ("RUN", "runs/easyvqa", "runs/easyvqa-base"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copytree(folder / "run", folder / name)
    photograph = Image.fromarray(data.astronaut())
    photograph.save(folder / "photo.jpg")
    line = {"image": "photo.jpg", "instruction": "make the circle red"}
    (folder / "requests.jsonl").write_text(json.dumps(line | {"output": "edited.png"}))
    (folder / "photographs").mkdir()
    photograph.save(folder / "photographs" / "photo.jpg")
    (folder / "photographs" / "instructions.jsonl").write_text(json.dumps(line))
    write_gedit(folder / "GEdit-Bench", count=1, files=1)
    for file in (folder / "GEdit-Bench").rglob("*.parquet"):  # the small tokenizer has no Chinese
        from pyarrow import compute, parquet

        table = parquet.read_table(file)
        parquet.write_table(table.filter(compute.equal(table["instruction_language"], "en")), file)
    (folder / "dreambooth" / "dataset").mkdir(parents=True)
    write_dreambooth(folder / "dreambooth" / "dataset")
    prompts = folder / "dreambooth" / "dataset" / "prompts_and_classes.txt"
    text = prompts.read_text().replace("stuffed animal", "circle").replace("dog2,dog", "dog2,circle")
    prompts.write_text(re.sub(r"'a \{0\} \{1\} [\w ]+'", "'red {0} {1}'", text))
    return folder


def _runs(words: list[str]) -> bool:
    return words[0].removeprefix("npedit_jax.") in RUN and not any("..." in word for word in words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_run_in_their_order(page, sandbox, monkeypatch):
    monkeypatch.chdir(sandbox)
    served = []
    monkeypatch.setattr(demo, "serve", lambda page, host, port, auth: served.append((page, host)))
    with serving(good) as server:
        for words in filter(_runs, commands(page)):
            arguments = [server.url if word.startswith("http://") else word for word in words[1:]]
            output = arguments[arguments.index("--output") + 1] if "--output" in arguments else None
            if "export" in words[0] and output:  # refuses to write over what another page has exported
                shutil.rmtree(output, ignore_errors=True)
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(words[0]).main(arguments)
            assert output is None or pathlib.Path(output).exists()
    assert all(host == "127.0.0.1" for _, host in served)


@pytest.mark.parametrize(
    ("page", "words"), [item for item in ALL if not _runs(item[1])], ids=lambda item: getattr(item, "name", "")
)
def test_other_commands_name_what_exists(page, words):
    assert importlib.util.find_spec(words[0]), f"{page.name}: no module {words[0]}"
    if any(word.startswith("--config") for word in words):
        _check_config(words[1:])
    if words[0] == "npedit_jax.train":  # its options are those of its config, and --workdir
        assert any(word.startswith("--workdir") for word in words)
        return
    shown = subprocess.run(
        [sys.executable, "-m", words[0], "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for word in words[1:]:
        if word.startswith("--") and not word.startswith("--config."):
            assert word.split("=")[0] in shown, f"{page.name}: {words[0]} has no option {word}"


def _check_config(words: list[str]) -> None:
    """The config file is there, and has every field that the command changes."""
    pairs = dict(re.findall(r"--([\w.]+)[= ](\S+)", " ".join(words)))
    spec = importlib.util.spec_from_file_location("config", ROOT / pairs["config"])
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT))
    config = module.get_config()
    for name in pairs:
        if name.startswith("config."):
            config_flags.config_path.get_value(name.removeprefix("config."), config)


def test_python_of_the_pages_runs(sandbox, monkeypatch):
    monkeypatch.chdir(sandbox)
    blocks = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    assert blocks and npedit_jax.Editor
    for block in blocks:
        exec(compile(block, "page", "exec"), {})  # noqa: S102
    assert np.asarray(Image.open("edited.png")).ndim == 3


def test_site_builds_with_every_page(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in (ROOT / "docs").glob("*.md"):
        place = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / place).exists()
    pages = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.html"))
    outside = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', pages)
    assert outside == []
