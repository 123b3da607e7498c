"""Test settings: slow tests on request, implicit broadcasting between ranks an error, programs compiled once."""

import atexit
import os
import pathlib
import shutil
import tempfile

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time of these tests; the plainer code of these two settings runs fast enough. Later versions
# have no such flag, and end at one that they do not know.
if jaxlib.version.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Of all workers and of the commands that tests start: what one has compiled the others read.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="npedit-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from collections.abc import Iterator

import hypothesis
import jax
import pytest
from absl import logging

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
# The same examples every time, however busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --slow."""
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the slow tests unless asked for."""
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    """A command run within a test sets how much is logged; the next test does not inherit that."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run to serve, of this worker's tests of the demo."""
    from tests import demo_server

    return demo_server.editor(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def demo_address(demo_run: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the demo serves that run."""
    from tests import demo_server

    with demo_server.serving(demo_run, tmp_path_factory.mktemp("log") / "log") as (address, _):
        yield address
