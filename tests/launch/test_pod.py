"""The scripts for pods against a stand-in gcloud that records its calls; every script through shellcheck."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
POD = LAUNCH / "pod"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
BASE = dict(
    NAME="job", ZONE="us-east5-a", TYPE="v5p-128", VERSION="v2-alpha-tpuv5", POLL_SECONDS="0", RESTART_SECONDS="0"
)
GCLOUD = """#!{python}
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["STANDIN"])
with (folder / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
kind = next((word for word in ("describe", "create", "delete", "ssh", "scp") if word in sys.argv), "")
answers = folder / kind
lines = answers.read_text().splitlines() if answers.exists() else []
if lines:
    answers.write_text("\\n".join(lines[1:]))
    status, _, text = lines[0].partition(" ")
    print(text)
    sys.exit(int(status))
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Runs a script with the stand-in; `answers` are "STATUS TEXT" lines by what gcloud is asked to do."""
    binary = tmp_path / "bin" / "gcloud"
    binary.parent.mkdir()
    binary.write_text(GCLOUD.format(python=sys.executable))
    binary.chmod(0o755)

    def call(script: str, *arguments: str, answers: dict[str, list[str]] | None = None, **settings: str):
        for name, lines in (answers or {}).items():
            (tmp_path / name).write_text("\n".join(lines))
        environment = {"PATH": f"{binary.parent}:{os.environ['PATH']}", "STANDIN": str(tmp_path), "HOME": str(tmp_path)}
        done = subprocess.run(
            [str(POD / script), *arguments],
            env=environment | BASE | settings,
            capture_output=True,
            text=True,
            timeout=60,
        )
        log = tmp_path / "calls"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return done, calls

    return call


SHELLCHECK = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run([SHELLCHECK, "-x", str(script)], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert done.returncode == 0, done.stdout


def test_create_asks_for_a_slice_and_waits_for_it(gcloud):
    states = ["0 WAITING_FOR_RESOURCES", "0 PROVISIONING", "0 ACTIVE"]
    done, calls = gcloud("create.sh", answers={"describe": states})
    assert done.returncode == 0, done.stderr
    assert calls[0][:5] == ["compute", "tpus", "queued-resources", "create", "job"]
    expected = {"--zone=us-east5-a", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--node-id=job"}
    assert expected | {"--spot"} == set(calls[0][5:])
    assert [call[3] for call in calls[1:]] == ["describe"] * 3


def test_create_on_demand_of_two_slices(gcloud):
    done, calls = gcloud("create.sh", answers={"describe": ["0 ACTIVE"]}, SPOT="false", SLICES="2", PROJECT="mine")
    assert done.returncode == 0, done.stderr
    assert "--spot" not in calls[0] and {"--node-count=2", "--node-prefix=job", "--project=mine"} <= set(calls[0])


def test_create_that_fails_says_so(gcloud):
    done, _ = gcloud("create.sh", answers={"describe": ["0 FAILED"]})
    assert done.returncode == 2 and "FAILED" in done.stderr
    done, calls = gcloud("create.sh", answers={"create": ["3 no quota"]})
    assert done.returncode == 3 and len(calls) == 1  # it does not wait for what was refused


def test_setup_copies_and_installs_on_all_hosts_of_all_slices(gcloud):
    done, calls = gcloud("setup.sh", SLICES="2")
    assert done.returncode == 0, done.stderr
    assert sorted(call[4] for call in calls[:2]) == ["job-0", "job-1"]  # whether their Python will do
    assert [(call[3], call[4] if call[3] == "ssh" else call[5].partition(":")[0]) for call in calls[2:4]] == [
        ("scp", "job-0"),
        ("scp", "job-1"),
    ]
    assert sorted(call[4] for call in calls[4:]) == ["job-0", "job-1"]
    assert all("--worker=all" in call for call in calls)
    assert ".[tpu]" in remote(calls[4])


def remote(call: list[str]) -> str:
    (word,) = (word for word in call if word.startswith("--command="))
    return word.removeprefix("--command=")


def test_setup_tells_what_to_do_about_an_old_python(gcloud, tmp_path):
    """As the hosts' shell runs it; a host that refuses ends the script before anything is copied."""
    for status in (0, 1):  # of the question whether the version will do
        old = tmp_path / f"python {status}"
        old.write_text(f"#!/bin/sh\nexit {status}\n")
        old.chmod(0o755)
        _, (check, *_) = gcloud("setup.sh", PYTHON=str(old))
        told = subprocess.run(["sh", "-c", remote(check)], capture_output=True, text=True)
        assert told.returncode == status
        assert ("install python3.11-venv, and start again with PYTHON=" in told.stderr) == bool(status)
    done, calls = gcloud("setup.sh", answers={"ssh": ["1 "]})
    assert done.returncode == 1 and len(calls) == 1


def command_of(call: list[str]) -> str:
    """What runs on a host: `bash -c` of it."""
    shell, flag, command = shlex.split(remote(call))
    assert (shell, flag) == ("bash", "-c")
    return command


def test_train_quotes_every_argument(gcloud):
    odd = "--config.data.options.negative_prompt=low quality; rm -rf $HOME 'x' \"y\""
    arguments = ["--config", "configs/zimage/npedit.py", "--workdir", "gs://bucket/a run", odd]
    done, calls = gcloud("train.sh", *arguments)
    assert done.returncode == 0, done.stderr
    (call,) = calls
    command = command_of(call)
    words = shlex.split(command.partition("2>&1")[0])
    assert words[words.index("npedit_jax.train") + 1 :] == arguments
    assert "NPEDIT_HOSTS=auto" in words
    (flags,) = (word for word in words if word.startswith("LIBTPU_INIT_ARGS="))
    assert all(flag.startswith("--xla_") for flag in flags.removeprefix("LIBTPU_INIT_ARGS=").split())


def test_train_command_passes_its_failure_on(gcloud, tmp_path):
    """The command that a host gets, run here with a stand-in for Python: its status is that of the training."""
    _, calls = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r")
    python = tmp_path / "npedit_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$@"\nexit 7\n')
    python.chmod(0o755)
    (word,) = (word for word in calls[0] if word.startswith("--command="))
    done = subprocess.run(
        ["bash", "-c", word.removeprefix("--command=")], cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert done.returncode == 7
    assert (tmp_path / "train.log").read_text() == "-m npedit_jax.train --config c.py --workdir gs://b/r\n"


def test_train_goes_on_after_a_preemption(gcloud):
    """The first run fails and the slice is gone: deleted, asked for again, set up, trained."""
    answers = {"ssh": ["1 lost", "0 ", "0 ", "0 "], "describe": ["0 SUSPENDED", "0 ACTIVE"]}
    done, calls = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r", answers=answers)
    assert done.returncode == 0, done.stderr
    set_up = ["ssh", "scp", "ssh"]  # which Python there is, the checkout, its installation
    assert [call[3] for call in calls] == ["ssh", "describe", "delete", "create", "describe", *set_up, "ssh"]


def test_train_restarts_on_an_active_slice_and_gives_up(gcloud):
    answers = {"ssh": ["1 x"] * 9, "describe": ["0 ACTIVE"] * 9}
    done, calls = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r", answers=answers, RETRIES="2")
    assert done.returncode == 2 and "gave up after 3 attempts" in done.stderr
    assert [call[3] for call in calls] == ["ssh", "describe"] * 3


def test_logs_and_delete(gcloud, tmp_path):
    done, calls = gcloud("logs.sh", str(tmp_path / "my logs"), HOSTS="2")
    assert done.returncode == 0, done.stderr
    assert [call[4:6] for call in calls] == [
        ["job:train.log", str(tmp_path / "my logs" / f"job-{host}.log")] for host in range(2)
    ]
    done, calls = gcloud("delete.sh")
    assert done.returncode == 0 and {"delete", "job", "--force", "--quiet"} <= set(calls[0])


@pytest.mark.parametrize("script", ["create.sh", "setup.sh", "train.sh", "logs.sh", "delete.sh", "multislice.sh"])
def test_dry_run_prints_and_calls_nothing(gcloud, script):
    rest = {"train.sh": ["--config", "c.py", "--workdir", "gs://b/r"], "logs.sh": ["logs"]}.get(script, [])
    done, calls = gcloud(script, "--dry-run", *rest, BUCKET="gs://b", RECORDS="/mnt/b/r")
    assert done.returncode == 0, done.stderr
    assert calls == [] and "gcloud compute tpus" in done.stdout


def test_two_slices_train_on_records_that_are_read_by_path(gcloud):
    done, _ = gcloud("multislice.sh", "--dry-run", BUCKET="gs://b", RECORDS="/mnt/b/my records/edits/NAME/1.0.0")
    trained = [command_of(shlex.split(line)) for line in done.stdout.splitlines() if "npedit_jax.train" in line]
    assert len(trained) == 2
    for command in trained:
        words = shlex.split(command.partition("2>&1")[0])
        assert "--config.data.records=/mnt/b/my records/edits/NAME/1.0.0" in words and "gs://b/npedit" in words


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "told"),
    [
        ("create.sh", [], {"ZONE": ""}, "set ZONE"),
        ("create.sh", [], {"TYPE": ""}, "set TYPE"),
        ("create.sh", ["now"], {}, "unexpected argument 'now'"),
        ("create.sh", [], {"SPOT": "maybe"}, "SPOT must be true or false"),
        ("delete.sh", [], {"SLICES": "0"}, "SLICES must be"),
        ("train.sh", [], {}, "give the arguments"),
        ("train.sh", ["--config", "c.py", "--workdir", "/tmp/run"], {}, "must be on a bucket"),
        ("logs.sh", [], {}, "give the directory"),
        ("multislice.sh", [], {"BUCKET": "gs://b"}, "set RECORDS"),
    ],
)
def test_bad_input_is_told_before_anything_is_called(gcloud, script, arguments, settings, told):
    done, calls = gcloud(script, *arguments, **settings)
    assert done.returncode == 2 and told in done.stderr and calls == []


def test_local_starts_as_many_hosts_as_told():
    command = [str(LAUNCH / "local.sh"), "--dry-run", "3", "--config", "a config.py", "--workdir", "w"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PORT": "9000"})
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[2] for line in lines] == [f"NPEDIT_HOSTS={host}/3@localhost:9000" for host in range(3)]
    assert all(line[-4:] == ["--config", "a config.py", "--workdir", "w"] for line in lines)
    assert subprocess.run(command[:2], capture_output=True).returncode == 2


def test_commands_of_the_page_run_as_they_stand(gcloud):
    text = (LAUNCH.parent / "docs" / "pods.md").read_text().replace("\\\n", " ")
    settings = dict(word.split("=") for word in re.search(r"^    export (.*)", text, re.MULTILINE)[1].split())
    lines = re.findall(r"^    ((?:[A-Z]+=\S+ )*)launch/pod/(\S+)([^#\n]*)", text, re.MULTILINE)
    assert {name for _, name, _ in lines} == {path.name for path in POD.glob("*.sh")} - {"settings.sh", "xla_flags.sh"}
    for own, name, rest in lines:
        own = dict(word.split("=") for word in own.split())
        done, calls = gcloud(name, *shlex.split(rest), answers={"describe": ["0 ACTIVE"]}, **settings | own)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert bool(calls) == ("--dry-run" not in rest), name
