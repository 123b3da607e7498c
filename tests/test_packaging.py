"""Wheel and source distribution: they hold what the package needs, and install in an environment that has nothing."""

import pathlib
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_and_sdist_install_cleanly(tmp_path):
    clone = tmp_path / "clone"  # what is committed: no leftovers of this checkout
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    command = [sys.executable, "-m", "build", "--outdir", tmp_path / "dist", clone]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (sdist,) = ((tmp_path / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    package = clone / "npedit_jax"
    wanted = {str(path.relative_to(clone)) for path in package.rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("npedit_jax/")}
    assert found == wanted
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted <= names and {"setup.py", "README.md", "LICENSE"} <= names

    for number, file in enumerate((wheel, sdist)):
        environment = tmp_path / f"environment{number}"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", file], check=True, cwd=tmp_path)
        subprocess.run([python, "-m", "pip", "check"], check=True, cwd=tmp_path)
        for module in ("train", "edit", "evaluate", "export", "convert", "demo"):
            command = [python, "-m", f"npedit_jax.{module}", "--help"]
            result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert "npedit_jax" in result.stdout + result.stderr and "Traceback" not in result.stderr, result.stderr
        code = (
            "import npedit_jax, npedit_jax.training.networks as n; print(n.resolve('package:pretrained/easyvqa/vae'))"
        )
        shown = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert pathlib.Path(shown.strip(), "config.json").exists() and str(environment) in shown
