"""The outer step on 8 devices: losses, gradients and checkpoints equal to one device's, see sharded_steps.py."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from npedit_jax.training import hosts

ROOT = pathlib.Path(__file__).parents[2]


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.sharded_steps", *arguments]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)


@pytest.mark.parametrize("mesh", ["all axes", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_meshes_of_eight_devices_compute_what_one_device_does(tmp_path, mesh):
    run = start([str(tmp_path), mesh])
    _, told = run.communicate()
    assert run.returncode == 0, told


@pytest.mark.slow
def test_two_processes_of_four_devices_compute_what_one_device_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = [start([str(tmp_path), "fsdp"], **{hosts.VARIABLE: f"{number}/2@{address}"}) for number in range(2)]
    told = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
