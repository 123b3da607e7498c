"""The outer step on 8 devices: losses, gradients and checkpoints equal to one device's, see sharded_steps.py."""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("mesh", ["all axes", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_meshes_of_eight_devices_compute_what_one_device_does(tmp_path, mesh):
    command = [sys.executable, "-m", "tests.training.sharded_steps", str(tmp_path), mesh]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
