"""Storage that fails: full, read-only, damaged or gone. What is whole stays whole and is what the restart takes."""

import contextlib
import os
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from npedit_jax import export
from npedit_jax.training import loop, stages, state, telemetry, workdirs
from npedit_jax.training.checkpoint import Checkpoints
from npedit_jax.training.faults import RunFault
from tests.faults import tiny_config
from tests.faults.command import Training, saved
from tests.training.tiny import autoencoder_config

# Orbax leaves coroutines behind where a checkpoint does not read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@contextlib.contextmanager
def _small_disk(path, kilobytes):
    path.mkdir()
    options = f"size={kilobytes}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.slow
@needs_mount
def test_disk_full_and_then_not(tmp_path):
    workdir = tmp_path / "disk" / "run"
    with _small_disk(tmp_path / "disk", 2000):
        first = Training(workdir, "--config.checkpoint.keep=100", "--config.steps=2000")
        assert first.wait() == 1
        # Threads of other libraries complain before and after.
        (message,) = (line for line in first.output().splitlines() if line.startswith("train: "))
        assert "No space left on device" in message
        whole, before = saved(workdir)[-1], telemetry.read_metrics(workdir)
        subprocess.run(["mount", "-o", "remount,size=8000k", tmp_path / "disk"], check=True)
        again = Training(workdir, "--config.checkpoint.keep=100", "--config.steps=2000")
        again.wait_for(lambda: saved(workdir)[-1] > whole)
        again.process.kill()
        again.process.join()
        after = telemetry.read_metrics(workdir)
    # Wall-clock figures tell a step that was taken again from one that was not.
    assert after[:whole] == before[:whole]
    assert after[whole]["step"] == whole + 1 and after[whole] not in before


@needs_mount
def test_read_only_directory_is_told_in_one_line(tmp_path):
    with _small_disk(tmp_path / "disk", 4000):
        workdir = tmp_path / "disk" / "run"
        workdirs.open_run(workdir, tiny_config.get_config())
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        run = Training(workdir)
        assert run.wait() == 1
        (line,) = run.output().splitlines()
        assert line.startswith("train: nothing can be written in ") and "Read-only file system" in line


def _state(value: float) -> state.TrainState:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(40, 50)), jnp.float32) + value
    params = {"autoencoder": {"kernel": kernel, "bias": jnp.full((3,), value, jnp.bfloat16)}}
    return state.create(params, {"autoencoder": optax.adam(1e-3)}, ("autoencoder",))


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, of steps 2, 4 and 6."""
    checkpoints = Checkpoints(tmp_path, every=2, keep=3)
    for step in (2, 4, 6):
        checkpoints.save(step, _state(step), {"place": step})
    checkpoints.close()
    return tmp_path


def _newest(workdir, **options):
    checkpoints = Checkpoints(workdir, every=2, keep=3, **options)
    try:
        return checkpoints.newest(lambda step: checkpoints.restore(step, _state(0.0)))
    finally:
        checkpoints.close()


def _check_step(found, step):
    assert found[0] == step and found[1][1] == {"place": step}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found[1][0]), jax.device_get(_state(step)))


def test_any_file_cut_or_gone_or_changed_never_gives_wrong_parameters(run, tmp_path_factory):
    files = [path for path in (run / "checkpoints" / "6").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 8
    passed_over = 0
    for number, file in enumerate(sorted(files)):
        for harm in ("cut", "gone", "changed"):
            copy = tmp_path_factory.mktemp("copy") / "run"
            shutil.copytree(run, copy)
            target, data = copy / file.relative_to(run), bytearray(file.read_bytes())
            if harm == "gone":
                target.unlink()
            elif harm == "cut":
                target.write_bytes(data[: len(data) // 2])
            else:
                data[len(data) // 2] ^= 0x10
                target.write_bytes(data)
            found = _newest(copy, read_only=number % 2 == 0)
            _check_step(found, found[0])
            assert found[0] in (4, 6)
            passed_over += found[0] == 4
            shutil.rmtree(copy)
    assert passed_over > len(files)


def test_damaged_newest_is_named_and_set_aside(run, caplog):
    shutil.rmtree(run / "checkpoints" / "6" / "state" / "d")
    _check_step(_newest(run), 4)
    assert "checkpoint of step 6 is damaged and passed over" in caplog.text
    assert saved(run) == [2, 4] and (run / "damaged" / "6" / "state").exists()
    checkpoints = Checkpoints(run, every=2, keep=3)
    checkpoints.save(6, _state(6), {"place": 6})
    checkpoints.close()
    _check_step(_newest(run), 6)


def test_reader_moves_nothing(run):
    shutil.rmtree(run / "checkpoints" / "6" / "state" / "d")
    _check_step(_newest(run, read_only=True), 4)
    assert saved(run) == [2, 4, 6]


def test_all_damaged_is_an_error_that_leaves_them(run):
    for step in (2, 4, 6):
        shutil.rmtree(run / "checkpoints" / str(step) / "state" / "d")
    with pytest.raises(RunFault, match="none of the checkpoints .* step 6: .*step 4: .*step 2: "):
        _newest(run)
    assert saved(run) == [2, 4, 6]


def test_flipped_bit_is_found_where_the_format_does_not_see_it(run, monkeypatch):
    """The sums say so: what is read differs from what was saved."""
    checkpoints = Checkpoints(run, every=2, keep=3, read_only=True)
    read = checkpoints._manager.restore

    def flipped(step, args):
        found = read(step, args=args)
        if step == 6 and "state" in found.keys():
            bias = found["state"].params["autoencoder"]["bias"]
            found["state"].params["autoencoder"]["bias"] = bias.at[1].set(bias[1] + 0.03125)
        return found

    monkeypatch.setattr(checkpoints._manager, "restore", flipped)
    with pytest.raises(ValueError, match="1 values are not what was saved: params/autoencoder/bias"):
        checkpoints.restore(6, _state(0.0))
    assert checkpoints.newest(lambda step: checkpoints.restore(step, _state(0.0)))[0] == 4


def test_checkpoints_deleted_under_a_run_are_begun_anew(tmp_path):
    """Between two of them; while one is being written the run ends with the error of that."""
    config, workdir = autoencoder_config(steps=8), tmp_path / "run"
    workdirs.open_run(workdir, config)

    def delete(stage, train_state, frozen, step):
        if step == 3:
            deadline = time.monotonic() + 60
            while not (workdir / "checkpoints" / "2").exists():
                assert time.monotonic() < deadline, "the checkpoint of step 2 was not written"
                time.sleep(0.01)
            shutil.rmtree(workdir / "checkpoints")

    final = loop.run(config, stages.build(config), workdir, preview=delete)
    assert saved(workdir)[-1] == 8
    params = export.trained_networks(workdir, raw=True)["autoencoder"].params
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(final.params["autoencoder"]))
