"""The command line of training: bad input gets one line and exit status 1, and leaves nothing behind."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "configs/easyvqa/autoencoder.py"


def _train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "npedit_jax.train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "configs/nope.py"], "no config file at configs/nope.py"),
        (["--config", CONFIG, "--config.stepz=3"], "stepz"),
        (["--config", CONFIG, "--config.steps=many"], "'many'"),
        (["--config", CONFIG, "--speed=9"], "Unknown command line flag 'speed'"),
        (["--config", CONFIG, "extra"], "unexpected arguments ['extra']"),
        (["--config", CONFIG, "--config.networks.autoencoder.directory=/nowhere"], "not both|either"),
        (["--config", "configs/easyvqa/warmup.py", "--config.networks.student.directory=/nowhere"], "/nowhere"),
    ],
    ids=["path", "field", "value", "flag", "argument", "two-sources", "weights"],
)
def test_bad_input_is_told_in_one_line(arguments, told, tmp_path):
    result = _train(*arguments, "--workdir", str(tmp_path / "run"))
    assert result.returncode == 1
    assert result.stderr.startswith("train: ") and len(result.stderr.splitlines()) == 1
    assert any(part in result.stderr for part in told.split("|"))
    assert not (tmp_path / "run").exists()


def test_help_says_how_it_is_called():
    result = _train("--help")
    assert result.returncode == 0 and "--config configs/X.py --workdir DIR" in result.stdout


def test_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = _train("--config", CONFIG, "--workdir", str(tmp_path))
    assert result.returncode == 1 and "holds no run" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
