"""Two hosts as two processes of four devices over loopback: one is killed, or told to stop; what the other does."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import weakref

import pytest

from npedit_jax.data.batches import Feed, HostShare
from npedit_jax.training import hosts, telemetry

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from tests.training.tiny import autoencoder_config

def get_config():
    config = autoencoder_config(steps={steps})
    config.batch_size, config.cpu_devices = 8, 4
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.checkpoint.every, config.log.preview_every = 5, 10**6
    return config
"""
# The command's own line, or JAX's where its service notices first and ends the process at once.
LOST = (
    r"^train: process \d lost another process of the run: |"
    r"JAX distributed service detected fatal errors\. This most likely indicates that another task died"
)


class Run:
    """Both processes of a run."""

    def __init__(self, folder: pathlib.Path, steps: int):
        config = folder / f"config_{steps}.py"
        config.write_text(CONFIG.format(steps=steps))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "npedit_jax.train", "--config", str(config), "--workdir", str(folder / "run")]
        self._logs = [(folder / f"host_{number}.log").open("w+") for number in range(2)]
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {hosts.VARIABLE: f"{number}/2@{address}", "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for number, log in enumerate(self._logs)
        ]
        for process in self.processes:
            weakref.finalize(self, process.kill)  # where a test fails, it may run on

    def wait(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]

    def told(self) -> list[str]:
        return [pathlib.Path(log.name).read_text() for log in self._logs]


def rows(folder: pathlib.Path) -> list[dict[str, float]]:
    return telemetry.read_metrics(folder / "run") if (folder / "run" / "metrics.jsonl").exists() else []


def wait_for_step(folder: pathlib.Path, step: int, run: Run) -> None:
    for _ in range(1200):
        if rows(folder) and rows(folder)[-1]["step"] >= step:
            return
        assert all(process.poll() is None for process in run.processes), run.told()
        time.sleep(0.2)
    raise AssertionError(run.told())


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killing_one_host_ends_the_other_and_a_restart_resumes(tmp_path, killed):
    run = Run(tmp_path, 100_000)
    wait_for_step(tmp_path, 10, run)
    run.processes[killed].kill()
    other = run.processes[1 - killed]
    assert other.wait(60) != 0
    assert re.search(LOST, run.told()[1 - killed], re.MULTILINE), run.told()[1 - killed]
    steps = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    # The same workdir, with the number of steps it may still take: a field that binds, so it is changed in the file.
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"steps": 100000', f'"steps": {steps + 3}'))
    again = Run(tmp_path, steps + 3)
    assert again.wait(180) == [0, 0], again.told()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, steps + 4))


@pytest.mark.slow
def test_sigterm_to_one_host_saves_and_ends_both_at_the_same_step(tmp_path):
    run = Run(tmp_path, 100_000)
    wait_for_step(tmp_path, 8, run)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait(30) == [128 + signal.SIGTERM] * 2, run.told()
    (step,) = {re.search(r"saved at step (\d+)", told)[1] for told in run.told()}
    assert (tmp_path / "run" / "checkpoints" / step).is_dir()
    assert rows(tmp_path)[-1]["step"] == int(step)


def test_each_host_takes_its_places_of_every_global_batch():
    class Numbers:
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return 0, index

    places = ((0, 3), (1, 5), (2, 4))  # as a mesh that follows the links of a pod gives them to hosts
    whole = HostShare(Numbers(), Feed(0, 12))
    shares = [HostShare(Numbers(), Feed(0, 4, own, of=6)) for own in places]
    for batch in range(4):
        for own, share in zip(places, shares, strict=True):
            expected = [whole[12 * batch + 2 * place + inside][1] for place in own for inside in range(2)]
            assert [share[4 * batch + sample][1] for sample in range(4)] == expected
    assert len(shares[0]) == 332


@pytest.mark.parametrize("value", ["2/2@localhost:9", "0/2", "yes", "0/2@localhost", "-1/2@localhost:9"])
def test_bad_variable_is_told(value):
    with pytest.raises(ValueError, match="NPEDIT_HOSTS must be auto or NUMBER/COUNT@HOST:PORT"):
        hosts.join({hosts.VARIABLE: value})


def test_a_process_by_itself_joins_nothing():
    assert not hosts.join({})
    assert not hosts.stop_at(1)
