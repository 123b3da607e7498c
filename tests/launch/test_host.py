"""The script that trains on one host, with a stand-in for the training: what it outlives, and how it is ended."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "pod" / "host.sh"
# Tells its arguments, its notices, and that it saved; ends by itself after LASTS tenths of a second.
TRAINING = """#!/bin/bash
notice() { echo "$1 noticed"; sleep 0.3; echo "saved by $$"; exit 143; }
trap "notice TERM" TERM
echo "begun $* by $$"
for ((i = 0; i < ${LASTS:-600}; i++)); do sleep 0.1; done
echo "ended"
exit "${STATUS:-0}"
"""


@pytest.fixture
def host(tmp_path):
    """Starts the script as a session of its own, in a home directory with the checkout."""
    script = tmp_path / "npedit_jax" / "launch" / "pod" / "host.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    python = tmp_path / "npedit_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(TRAINING)
    python.chmod(0o755)
    started = []

    def start(*arguments, **settings):
        process = subprocess.Popen(
            [str(script), *arguments],
            env=os.environ | {"HOME": str(tmp_path)} | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    if (tmp_path / "train.pid").exists():
        os.kill(int((tmp_path / "train.pid").read_text()), signal.SIGKILL)


def wait_for(log, text):
    deadline = time.monotonic() + 30
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.02)


@pytest.mark.parametrize("status", [0, 2, 7])
def test_status_and_output_are_those_of_the_training(host, tmp_path, status):
    process = host("train", "--config", "a config.py", LASTS="1", STATUS=str(status))
    output, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert "begun -m npedit_jax.train --config a config.py by" in output.decode() and b"ended" in output
    assert (tmp_path / "train.log").read_bytes() == output and not (tmp_path / "train.pid").exists()


def test_a_host_that_is_taken_away_saves(host, tmp_path):
    """Every process of the session gets both signals, and nobody reads the output any longer."""
    process, log = host("train"), tmp_path / "train.log"
    wait_for(log, "begun")
    process.stdout.close()
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.pid, number)
    assert process.wait(30) == 143
    wait_for(log, "saved")


def test_the_signal_to_the_script_alone_reaches_the_training(host, tmp_path):
    process = host("train")
    wait_for(tmp_path / "train.log", "begun")
    process.terminate()
    assert process.wait(30) == 143 and "saved" in (tmp_path / "train.log").read_text()


def test_a_lost_connection_changes_nothing(host, tmp_path):
    process, log = host("train", LASTS="10"), tmp_path / "train.log"
    wait_for(log, "begun")
    process.stdout.close()
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(30) == 0
    wait_for(log, "ended")


def test_stop_and_the_next_training_end_the_one_before(host, tmp_path):
    log = tmp_path / "train.log"
    first = host("train")
    wait_for(log, "begun")
    second = host("train", "--second")
    wait_for(log, "begun -m npedit_jax.train --second")
    assert first.wait(30) == 143 and log.read_text().index("saved") < log.read_text().index("--second")
    stop = host("stop")
    assert stop.wait(30) == 0 and second.wait(30) == 143
    assert log.read_text().count("saved") == 2
    assert host("stop").wait(30) == 0  # nothing runs


def test_a_training_that_does_not_end_is_ended(host, tmp_path):
    python = tmp_path / "npedit_jax" / ".venv" / "bin" / "python"
    python.write_text(TRAINING.replace("exit 143", "for ((;;)); do sleep 0.1; done"))
    process = host("train")
    wait_for(tmp_path / "train.log", "begun")
    assert host("stop", STOP_SECONDS="1").wait(30) == 0
    assert process.wait(30) == 137


def test_a_number_that_another_process_has_by_now_is_left_alone(host, tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "train.pid").write_text(f"{other.pid}\n")
        assert host("stop").wait(30) == 0 and other.poll() is None
        other.kill()
    (tmp_path / "train.pid").unlink()


def test_the_bucket_is_mounted_where_it_is_not(host, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, content in {"gcsfuse": f'echo "$@" > {tmp_path}/mounted', "mountpoint": "exit 1"}.items():
        (tools / name).write_text(f"#!/bin/bash\n{content}\n")
        (tools / name).chmod(0o755)
    own = tmp_path / "npedit_jax" / "weights"
    own.mkdir()
    settings = {"PATH": f"{tools}:{os.environ['PATH']}", "MOUNT": "my-bucket", "LASTS": "1"}
    assert host("train", **settings).wait(30) == 0
    assert (tmp_path / "mounted").read_text() == "--implicit-dirs my-bucket /mnt/my-bucket\n"
    assert os.readlink(tmp_path / "npedit_jax" / "records") == "/mnt/my-bucket/records"
    assert not own.is_symlink()  # what the checkout has of its own stays


def test_anything_else_is_refused(host):
    output, _ = host("restart").communicate(timeout=30)
    assert b"expected train or stop, found restart" in output
