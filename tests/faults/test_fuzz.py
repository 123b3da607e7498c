"""Damaged and hostile files: refused with the documented error, never with another, a crash, or without end."""

import concurrent.futures
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import fuzz
from tests.faults.command import ROOT

INPUTS = 100_000  # over all targets, of the slow test


def _mutated(seeds):
    """Whole files with a few changes: other bytes, a piece cut out, put in, or repeated."""
    place = st.floats(0, 1)

    def change(data, changes):
        for kind, at, piece in changes:
            at = int(at * len(data))
            if kind == "set":
                data = data[:at] + piece + data[at + len(piece) :]
            elif kind == "insert":
                data = data[:at] + piece + data[at:]
            elif kind == "cut":
                data = data[:at] + data[at + len(piece) :]
            else:
                data = data[:at]
        return data

    pieces = st.binary(min_size=1, max_size=8) | st.sampled_from(
        [b"-1", b"1e400", b"NaN", b"[", b'"', b"{}", b"null", b"99999999999999999999", b"\xff" * 8, b"[" * 5000]
    )
    changes = st.lists(st.tuples(st.sampled_from(["set", "insert", "cut", "end"]), place, pieces), max_size=4)
    return st.builds(change, st.sampled_from(seeds), changes) | st.binary(max_size=200)


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_damaged_files_give_the_documented_error(name, tmp_path):
    target = fuzz.target(name)
    assert all(fuzz.check(target, seed, tmp_path) for seed in target.seeds if seed not in (b"{}", b"{}\n"))

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(_mutated(target.seeds))
    def run(data):
        fuzz.check(target, data, tmp_path)

    run()


def _fuzz(name: str, inputs: int) -> str:
    command = [sys.executable, "-m", "tests.faults.fuzz", name, "--inputs", str(inputs)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_a_hundred_thousand_inputs():
    pytest.importorskip("atheris")
    share = -(-INPUTS // len(fuzz.NAMES))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(_fuzz, fuzz.NAMES, [share] * len(fuzz.NAMES)))
    total = 0
    for output in outputs:
        print(output, end="")
        inputs, peak = map(int, re.search(r"(\d+) inputs, \d+ taken, peak (\d+) MiB", output).groups())
        assert peak < fuzz.MEMORY
        total += inputs
    assert total >= INPUTS
