"""The command line of training: bad input gets one line and exit status 2, and leaves nothing behind."""

import subprocess
import sys

import pytest

from tests.faults.command import ROOT, Training

CONFIG = "configs/easyvqa/autoencoder.py"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "configs/nope.py"], "no config file at configs/nope.py"),
        (["--config", "configs/easyvqa"], "no config file at configs/easyvqa"),
        (["--config", CONFIG, "--config.stepz=3"], "'stepz' Did you mean"),
        (["--config", CONFIG, "--config.steps=-4"], "config.steps must be 1 or more, found -4"),
        (["--config", CONFIG, "--config.cpu_devices=0"], "config.cpu_devices must be 1 or more, found 0"),
        (["--config", CONFIG, "--config.steps=many"], "'many'"),
        (["--config", CONFIG, "--speed=9"], "Unknown command line flag 'speed'"),
        (["--config", CONFIG, "extra"], "unexpected arguments ['extra']"),
        (["--config", CONFIG, "--config.networks.autoencoder.directory=/nowhere"], "not both|either"),
        (["--config", "configs/easyvqa/warmup.py", "--config.networks.student.directory=/nowhere"], "/nowhere"),
    ],
    ids=["path", "folder", "field", "steps", "devices", "value", "flag", "argument", "two-sources", "weights"],
)
def test_bad_input_is_told_in_one_line(arguments, told, tmp_path):
    run = Training(tmp_path / "run", *arguments)
    assert run.wait() == 2
    (line,) = run.output().splitlines()
    assert line.startswith("train: ") and any(part in line for part in told.split("|"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "status", "told"),
    [
        ("--help", 0, "--config configs/X.py --workdir DIR"),
        ("--config=configs/nope.py", 2, "train: no config file at configs/nope.py"),
    ],
)
def test_module_is_a_command(argument, status, told):
    command = [sys.executable, "-m", "npedit_jax.train", argument]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == status and told in (result.stderr if status else result.stdout)


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = Training(tmp_path / "notes.txt", "--config", CONFIG)
    assert run.wait() == 2 and "notes.txt is a file" in run.output() and len(run.output().splitlines()) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("lacks", "told"), [("cpu_devices", "config lacks cpu_devices"), ("stage", "unknown stage None")]
)
def test_config_without_a_field_is_told(lacks, told, tmp_path):
    (tmp_path / "config.py").write_text(
        "from configs.easyvqa import autoencoder\n\n\ndef get_config():\n    config = autoencoder.get_config()\n"
        f"    del config.{lacks}\n    return config\n"
    )
    run = Training(tmp_path / "run", "--config", str(tmp_path / "config.py"))
    assert run.wait() == 2
    (line,) = run.output().splitlines()
    assert line.startswith("train: ") and told in line and not (tmp_path / "run").exists()


def test_without_a_workdir_it_says_so():
    command = [sys.executable, "-m", "npedit_jax.train", "--config", CONFIG]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2 and "workdir" in result.stderr and len(result.stderr.splitlines()) == 1


def test_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = Training(tmp_path, "--config", CONFIG)
    assert run.wait() == 2 and "holds no run" in run.output()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
