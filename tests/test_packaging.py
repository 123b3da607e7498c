"""Wheel and source distribution: they hold what the package needs, and install in an environment that has nothing."""

import pathlib
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata

import pytest
import setuptools
from packaging import requirements

ROOT = pathlib.Path(__file__).parents[1]


def test_extras_of_setup_py_are_those_that_packages_have(monkeypatch):
    """pip warns of one that a package has not, and installs nothing for it."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    extras = given["extras_require"]
    for line in [*given["install_requires"], *(line for lines in extras.values() for line in lines)]:
        needed = requirements.Requirement(line)
        if needed.name == "npedit_jax":
            assert needed.extras <= extras.keys(), line
        elif needed.extras:
            assert needed.extras <= set(metadata.metadata(needed.name).get_all("Provides-Extra")), line
    # A pod's working directory lies on gs://: etils opens it with gcsfs, tensorboardX with Google's own client.
    assert {"etils[epath-gcs]", "google-cloud-storage"} <= set(extras["gcs"]) and "npedit_jax[gcs]" in extras["tpu"]


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
