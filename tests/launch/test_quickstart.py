"""The two commands of a first visit, with a stand-in for Python: what they run, and that they end at what fails."""

import os
import pathlib
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
PYTHON = """#!/bin/bash
echo "$* | $XLA_FLAGS" >> "$STANDIN/calls"
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  -c*jax.devices*) exit "${REFUSES:-0}" ;;
  *"$FAILS"*) [ -z "$FAILS" ] || exit 3 ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """Runs a script in a folder that has nothing but the scripts; returns what ended, and what Python was asked."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(script, *arguments, **settings):
        environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "STANDIN": str(tmp_path)}
        environment |= {"FAILS": "", "XLA_FLAGS": ""} | settings
        command = ["bash", str(tmp_path / "launch" / script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return done, calls

    return run


def test_quickstart_installs_trains_and_evaluates(clone):
    done, calls = clone("quickstart.sh", "--config.steps=2")
    assert done.returncode == 0, done.stderr
    assert [call.split(" | ")[0].split()[1] for call in calls if not call.startswith("-c")] == [
        "venv", "pip", "npedit_jax.train", "npedit_jax.evaluate"
    ]  # fmt: skip
    train, evaluate = calls[-2:]
    assert "--workdir runs/easyvqa --config.steps=2 |" in train and "--report runs/easyvqa/report.html" in evaluate
    assert train.endswith("--xla_cpu_experimental_ynn_fusion_type=")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "quickstart.sh", "quickstart.sh, 1 of 2", "quickstart.sh, 2 of 2", "quickstart.sh"
    ]  # fmt: skip


def test_quickstart_does_without_a_flag_that_xla_does_not_know(clone):
    _, calls = clone("quickstart.sh", REFUSES="1", XLA_FLAGS="--xla_mine=1")
    assert all(call.endswith("| --xla_mine=1") for call in calls if "npedit_jax.train" in call)


@pytest.mark.parametrize(("script", "fails"), [("quickstart.sh", "npedit_jax.train"), ("test.sh", "pip")])
def test_the_first_failure_ends_it(clone, script, fails):
    done, calls = clone(script, FAILS=fails)
    assert done.returncode == 3 and fails in calls[-1]


def test_the_venv_is_used_again(clone):
    clone("quickstart.sh")
    _, calls = clone("quickstart.sh")
    assert "venv" not in calls[0]
