"""The outer step on 8 devices: losses, gradients and checkpoints equal to one device's, see sharded_steps.py."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from npedit_jax.training import hosts

ROOT = pathlib.Path(__file__).parents[2]


def start(told: pathlib.Path, arguments: list[str], **environment: str) -> subprocess.Popen:
    """Runs sharded_steps.py; what it tells goes to a file, which never fills up as a pipe does."""
    command = [sys.executable, "-m", "tests.training.sharded_steps", *arguments]
    with told.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=file)


@pytest.mark.parametrize(
    ("unroll", "mesh"),
    [
        (1, "all axes"),
        pytest.param(2, "all axes", marks=pytest.mark.slow),
        pytest.param(2, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_meshes_of_eight_devices_compute_what_one_device_does(tmp_path, unroll, mesh):
    told = tmp_path / "told"
    assert start(told, [str(tmp_path), str(unroll), mesh]).wait() == 0, told.read_text()


@pytest.mark.slow
def test_two_processes_of_four_devices_compute_what_one_device_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    told = [tmp_path / f"told-{number}" for number in range(2)]
    runs = [
        start(told[number], [str(tmp_path), "2", "fsdp"], **{hosts.VARIABLE: f"{number}/2@{address}"})
        for number in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0], [path.read_text() for path in told]
