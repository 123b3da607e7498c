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

from benchmarks import tpu_compile

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
POD = LAUNCH / "pod"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
COMMANDS = {path.name for path in POD.glob("*.sh")} - {"host.sh", "settings.sh", "xla_flags.sh"}
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
    print(text, file=sys.stderr if int(status) else sys.stdout)
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


@pytest.mark.parametrize("answer", ["1 UNAVAILABLE: try again", "1 NOT_FOUND: no such resource"])
def test_create_does_not_wait_for_ever_for_what_cannot_be_seen(gcloud, answer):
    done, calls = gcloud("create.sh", answers={"describe": [answer] * 50})
    assert done.returncode == 2 and "cannot be seen" in done.stderr and len(calls) == 11
    done, _ = gcloud("create.sh", answers={"describe": [answer] * 9 + ["0 WAITING"] + [answer] * 9 + ["0 ACTIVE"]})
    assert done.returncode == 0


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


def test_setup_installs_extras_and_readies_the_mount(gcloud, tmp_path):
    done, calls = gcloud("setup.sh", EXTRAS="tpu,wandb", MOUNT="my-bucket")
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in calls] == ["ssh", "ssh", "scp", "ssh"] and ".[tpu,wandb]" in remote(calls[3])
    made = tmp_path / "host"
    made.mkdir()
    for name, content in {"sudo": f'echo "$@" >> {made}/done', "gcsfuse": "true"}.items():
        (made / name).write_text(f"#!/bin/bash\n{content}\n")
        (made / name).chmod(0o755)
    with_it = os.environ | {"PATH": f"{made}:{os.environ['PATH']}"}
    assert subprocess.run(["sh", "-c", remote(calls[1])], env=with_it).returncode == 0
    assert (made / "done").read_text() == f"mkdir -p /mnt/my-bucket\nchown {os.getuid()} /mnt/my-bucket\n"
    without = subprocess.run(["sh", "-c", remote(calls[1])], capture_output=True, text=True)
    assert without.returncode == 1 and "no gcsfuse" in without.stderr


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


def command_of(call: list[str]) -> list[str]:
    """The words of what runs on a host that has the checkout: environment and command."""
    shell, flag, command = shlex.split(remote(call))
    assert (shell, flag) == ("bash", "-c")
    assert subprocess.run(["bash", "-c", command], cwd="/").returncode == 3  # no checkout there
    return shlex.split(command.partition("; exec ")[2])


def test_train_quotes_every_argument(gcloud):
    odd = "--config.data.options.negative_prompt=low quality; rm -rf $HOME 'x' \"y\""
    arguments = ["--config", "configs/zimage/npedit.py", "--workdir", "gs://bucket/a run", odd]
    done, calls = gcloud("train.sh", *arguments, PASS="KEY PRECISION", KEY="a b'c", PRECISION="high", MOUNT="bucket")
    assert done.returncode == 0, done.stderr
    (call,) = calls
    words = command_of(call)
    start = words.index("npedit_jax/launch/pod/host.sh")
    assert words[start + 1 :] == ["train", *arguments]
    given = dict(word.split("=", 1) for word in words[1:start])
    assert all(flag.startswith("--xla_") for flag in given.pop("LIBTPU_INIT_ARGS").split())
    assert given == {"NPEDIT_HOSTS": "auto", "KEY": "a b'c", "PRECISION": "high", "MOUNT": "bucket"}


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
    assert [call[3] for call in calls] == ["ssh", "describe", "ssh", "describe", "ssh"]


def test_train_does_not_repeat_what_is_refused(gcloud):
    """Status 2, of any slice: the arguments, which the next start would have too."""
    answers = {"ssh": ["2 train: no config file", "0 "]}
    done, calls = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r", answers=answers, SLICES="2")
    assert done.returncode == 2 and "refused its arguments" in done.stderr and len(calls) == 2


def test_train_sets_up_hosts_that_have_no_checkout(gcloud):
    answers = {"ssh": ["3 ", "0 ", "0 ", "0 "], "describe": ["0 ACTIVE"]}
    done, calls = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r", answers=answers)
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in calls] == ["ssh", "describe", "ssh", "scp", "ssh", "ssh"]


def test_train_deletes_nothing_because_gcloud_cannot_tell(gcloud):
    answers = {"ssh": ["1 lost", "0 "], "describe": ["1 UNAVAILABLE", "0 ACTIVE"]}
    done, calls = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r", answers=answers)
    assert done.returncode == 0 and "UNAVAILABLE" in done.stderr
    assert [call[3] for call in calls] == ["ssh", "describe", "describe", "ssh"]


@pytest.mark.parametrize("part", ["delete", "create", "scp", "ssh"])
def test_train_asks_again_where_a_part_of_the_way_back_fails(gcloud, part):
    """The slice is taken away, and the first try to have one again fails somewhere."""
    answers = {"ssh": ["1 lost"], "describe": ["0 SUSPENDED"] + ["0 ACTIVE"] * 9, part: ["1 UNAVAILABLE"]}
    if part == "ssh":
        answers[part] = ["1 lost", "0 ", "1 UNAVAILABLE"]  # the installation
    done, calls = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r", answers=answers)
    assert done.returncode == 0, done.stderr
    assert "ssh" in calls[-1] and "host.sh" in remote(calls[-1])
    if part in ("scp", "ssh"):  # there is a slice: only its setup is tried again
        assert [call[3] for call in calls].count("create") == 1
        assert [call[3] for call in calls][-3:] == ["scp", "ssh", "ssh"]


def test_train_asks_for_a_slice_that_is_gone(gcloud):
    answers = {"ssh": ["1 lost"], "describe": ["1 NOT_FOUND", "0 ACTIVE"]}
    done, calls = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r", answers=answers)
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in calls][:4] == ["ssh", "describe", "create", "describe"]
    done, _ = gcloud("train.sh", "--config", "c.py", "--workdir", "gs://b/r", answers=answers, TYPE="")
    assert done.returncode == 2 and "set TYPE and VERSION" in done.stderr


def test_logs_and_delete(gcloud, tmp_path):
    done, calls = gcloud("logs.sh", str(tmp_path / "my logs"), HOSTS="2")
    assert done.returncode == 0, done.stderr
    assert [call[4:6] for call in calls] == [
        ["job:train.log", str(tmp_path / "my logs" / f"job-{host}.log")] for host in range(2)
    ]
    done, ((*_, command),) = gcloud("stop.sh")
    assert done.returncode == 0 and command == "--command=npedit_jax/launch/pod/host.sh stop"
    done, calls = gcloud("delete.sh")
    assert done.returncode == 0 and {"delete", "job", "--force", "--quiet"} <= set(calls[0])


@pytest.mark.parametrize("script", sorted(COMMANDS))
def test_dry_run_prints_and_calls_nothing(gcloud, script):
    rest = {"train.sh": ["--config", "c.py", "--workdir", "gs://b/r"], "logs.sh": ["logs"]}.get(script, [])
    done, calls = gcloud(script, "--dry-run", *rest, BUCKET="gs://b", RECORDS="/mnt/b/r")
    assert done.returncode == 0, done.stderr
    assert calls == [] and "gcloud compute tpus" in done.stdout


def test_two_slices_train_on_records_that_are_read_by_path(gcloud):
    """With the settings that the benchmark compiles two slices with."""
    (compiled,) = (case for case in tpu_compile.CASES if getattr(case, "slices", 1) == 2)
    done, _ = gcloud("multislice.sh", "--dry-run", BUCKET="gs://b", RECORDS="my records/edits/NAME/1.0.0")
    trained = [command_of(shlex.split(line)) for line in done.stdout.splitlines() if "host.sh" in line]
    assert len(trained) == 2
    for words in trained:
        assert "--config.data.records=my records/edits/NAME/1.0.0" in words and "gs://b/npedit" in words
        assert "MOUNT=b" in words and set(compiled.settings()) <= set(words)


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
        ("train.sh", ["--config", "c.py", "--workdir=gs://b/r"], {"PASS": "KEY"}, "PASS names KEY"),
        ("setup.sh", [], {"EXTRAS": "tpu; rm"}, "EXTRAS must be"),
        ("setup.sh", [], {"MOUNT": "gs://b"}, "MOUNT must be"),
        ("logs.sh", [], {}, "give the directory"),
        ("multislice.sh", [], {"BUCKET": "gs://b"}, "set RECORDS"),
        ("multislice.sh", [], {"BUCKET": "b", "RECORDS": "r"}, "set BUCKET=gs://NAME, found 'b'"),
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
    assert {name for _, name, _ in lines} == COMMANDS
    for own, name, rest in lines:
        own = dict(word.split("=") for word in own.split())
        done, calls = gcloud(name, *shlex.split(rest), answers={"describe": ["0 ACTIVE"]}, **settings | own)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert bool(calls) == ("--dry-run" not in rest), name
