"""The documentation's commands: those that need no long training run, and all others name what exists."""

import contextlib
import functools
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
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image
from skimage import data

import npedit_jax
from npedit_jax import demo, export
from npedit_jax.training import stages
from tests.data import record_sets
from tests.evaluation.test_cases import write_dreambooth, write_gedit
from tests.evaluation.vie_server import good, serving
from tests.tiny_editor import write_run

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Entry points that run here as the page says; of the others the options are looked up.
RUN = (
    "edit", "evaluate", "export", "demo", "convert", "data.prepare", "data.select", "data.report", "data.instructions",
    "pytorch.edit",
)  # fmt: skip
NEEDS = {"data.prepare": "apache_beam"}
# What a page's line may begin with, apart from variables, and is then one of these checked kinds of commands.
SHELL = ("python", "python3", "pip", ".venv/bin/pip", "bash", "git", "vllm", "export")
SAMPLING = dict(times=(1.0, 0.5), sampler="ddim", eta=1.0)


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words of every `python -m npedit_jax... --...` of the page; the file edit.py is a copy of a module."""
    text = page.read_text().replace("\\\n", " ").replace("python edit.py", "python -m npedit_jax.pytorch.edit")
    lines = re.findall(r"(?:^ *|`)(?:[A-Z_]+=\S+ +)*python -m (npedit_jax\.[\w.]+ [^#\n`]+)", text, re.MULTILINE)
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
    photograph.resize((16, 16)).save(folder / "in.png")  # the PyTorch script takes sizes of the networks alone
    for place in ("Z-Image", "weights/Z-Image"):
        export.export(folder / "run", folder / place, frozen=True)
    record_sets.write(folder / "DIR", record_sets.photograph_records(6))
    bare = record_sets.photograph_records(3)
    for number in range(len(bare)):
        record_sets.changed(bare, number, instruction="", edited_caption="", input_caption="", edit_type="", object="")
    record_sets.write(folder / "records" / "edits" / "photos" / "1.0.0", bare)
    (folder / "IMAGES").mkdir()
    photograph.save(folder / "IMAGES" / "photo.jpg")
    item = {"input_image_path": "photo.jpg", "edit_instruction": "remove it", "edit_type": "remove", "id": "0"}
    item |= {"edited_caption": "a", "input_description": "b", "category": "it", "dataset_source": "set"}
    (folder / "merged_edit_data.json").write_text(json.dumps([item]))
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
    name = words[0].removeprefix("npedit_jax.")
    there = importlib.util.find_spec(NEEDS.get(name, "npedit_jax")) is not None
    return name in RUN and there and not any("..." in word for word in words)


def _here(word: str, server: str) -> str:
    """A word of a command as it can be run: addresses and buckets are here, and the small editor knows no dogs."""
    word = server if word.startswith("http://") else word.replace("gs://", "buckets/")
    return word.replace("the dog", "the circle")


@pytest.mark.parametrize(
    "page",
    # What these show is what tests/test_edit.py and tests/evaluation run, option by option.
    [pytest.param(page, marks=[pytest.mark.slow] if page.name in ("try.md", "evaluate.md") else []) for page in PAGES],
    ids=lambda page: page.name,
)
def test_commands_of_a_page_run_in_their_order(page, sandbox, monkeypatch):
    monkeypatch.chdir(sandbox)
    served = []
    monkeypatch.setattr(demo, "serve", lambda page, host, port, auth: served.append((page, host)))
    with serving(_answer) as server:
        for words in filter(_runs, commands(page)):
            arguments = [_here(word, server.url) for word in words[1:]]
            output = arguments[arguments.index("--output") + 1] if "--output" in arguments else None
            if words[0] in ("npedit_jax.export", "npedit_jax.convert"):  # refuse to write over what another page has
                shutil.rmtree(output, ignore_errors=True)
            monkeypatch.setattr(sys, "argv", [words[0], *arguments])
            with contextlib.redirect_stdout(io.StringIO()):
                assert not importlib.import_module(words[0]).main()
            assert output is None or pathlib.Path(output).exists()
    assert all(host == "127.0.0.1" for _, host in served)


@pytest.mark.parametrize(
    ("page", "words"), [item for item in ALL if not _runs(item[1])], ids=lambda item: getattr(item, "name", "")
)
def test_other_commands_name_what_exists(page, words):
    assert importlib.util.find_spec(words[0]), f"{page.name}: no module {words[0]}"
    pytest.importorskip(NEEDS.get(words[0].removeprefix("npedit_jax."), "npedit_jax"))
    if any(word.startswith("--config") for word in words):
        _check_config(words[1:])
    if words[0] == "npedit_jax.train":  # its options are those of its config, and --workdir
        assert any(word.startswith("--workdir") for word in words)
        stages.check(_config_of(words[1:]))
        return
    shown = _help(words[0])
    for word in words[1:]:
        if word.startswith("--") and not word.startswith("--config."):
            assert word.split("=")[0] in shown, f"{page.name}: {words[0]} has no option {word}"


ANSWER = dict(input_caption="a woman", object="the flag", instruction="Remove the flag.", edited_caption="a woman")


def _answer(number, content):
    """As a model that grades edits, and one that writes instructions where it is not asked for grades."""
    asked = " ".join(part.get("text", "") for part in content) if isinstance(content, list) else content
    return good(number, content) if '"score"' in asked else (200, json.dumps(ANSWER))


@functools.cache
def _help(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in shown.stderr
    return shown.stdout + shown.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_else_that_a_page_tells_to_run_is_there(page):
    """Scripts are in their place, extras in setup.py; `tests/launch` runs the scripts of the page on pods."""
    text, extras = page.read_text().replace("\\\n", " "), (ROOT / "setup.py").read_text()
    for line in re.findall(r"^    (\S.*)", text, re.MULTILINE):
        words = [word for word in line.split("#")[0].split() if not re.match(r"[A-Z_]+=", word)]
        if "launch/" in line.split("#")[0]:
            assert (ROOT / next(word for word in words if word.startswith("launch/"))).is_file(), line
        elif words[:1] and words[1:2] != ["="] and re.fullmatch(r"[\w./-]+", words[0]) and shutil.which(words[0]):
            assert words[0] in SHELL, f"{page.name}: nothing checks {line!r}"
    for name in re.findall(r"pip install (?:-e )?'(?:npedit_jax|\.)\[(\w+)\]'", text):
        assert f'"{name}": ' in extras, f"{page.name}: no extra {name}"
    for name in re.findall(r"python ((?:benchmarks|launch)/\S+\.py)", text):
        assert (ROOT / name).is_file(), f"{page.name}: no {name}"


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


def _config_of(words: list[str]) -> ConfigDict:
    """The config that the command's flags come to, parsed as the command does."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *words])  # where the library looks for changed fields
        patch.syspath_prepend(str(ROOT))
        values(["train", *words])
        return values.config


def test_batches_are_shown_as_the_page_says(sandbox):
    (words,) = (words for page, words in ALL if page.name == "data.md" and words[0] == "npedit_jax.data.inspect")
    words = [word.replace("configs/zimage/npedit.py", "configs/easyvqa/npedit.py") for word in words[1:]]
    words = [word for word in words if not word.startswith("--config.")]  # the small experiment reads no records
    command = [sys.executable, "-m", "npedit_jax.data.inspect", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (sandbox / "configs").exists() or (sandbox / "configs").symlink_to(ROOT / "configs")
    subprocess.run(command, cwd=sandbox, env=environment, check=True, capture_output=True)
    assert "make the" in (sandbox / "page.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [words for _, words in ALL if words[0] == "npedit_jax.train" and "easyvqa" in words[2]]
)
def test_training_begins_as_the_page_says(words, sandbox):
    """A step of each stage of the small experiment, with its own networks."""
    short = ["--config.steps=1", "--config.batch_size=2", "--config.log.preview_every=1000"]
    (sandbox / "configs").exists() or (sandbox / "configs").symlink_to(ROOT / "configs")
    words = [word.replace("runs/", "begun/") for word in words]
    command = [sys.executable, "-m", *words, *short]
    subprocess.run(command, cwd=sandbox, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert (sandbox / words[words.index("--workdir") + 1] / "checkpoints" / "1").is_dir()


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
