"""What is left out, and why."""

import dataclasses
import itertools
import resource
import subprocess
import sys

from npedit_jax.data import records, report, select
from npedit_jax.data.select import Filters
from tests.data import record_sets
from tests.data.test_records import record


def test_each_reason_and_back(tmp_path):
    written = [
        record(0),
        record(1, id="copy", image=record(0).image, instruction=record(0).instruction),
        record(2, width=255),
        record(3, width=4000),
        record(4, instruction=""),
        record(5, instruction="x" * 1001),
        record(6, edit_type="zoom_in"),
        record(10, object=""),
        record(8),
        record(9, object=""),
    ]
    records.write(tmp_path, "cats", written, per_shard=3)
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.array_record*"))]
    assert select.apply(tmp_path, Filters()) == dict.fromkeys(select.REASONS, 1)
    found = records.Records(tmp_path)
    assert [found[number].id for number in found.kept()] == ["cats-0", "cats-8", "cats-9"]
    assert found.manifest["filters"] == dataclasses.asdict(Filters())
    everything = Filters(False, 0, 100.0, False, 10_000, False, False)
    assert select.apply(tmp_path, everything) == dict.fromkeys(select.REASONS, 0)
    assert len(records.Records(tmp_path).kept()) == 10
    assert before == [path.read_bytes() for path in sorted(tmp_path.glob("*.array_record*"))]


def test_of_records_that_are_alike_one_that_passes_the_rest_is_used(tmp_path):
    alike = [record(0, id=id, edit_type=edit_type) for id, edit_type in
             (("zoom", "zoom_in"), ("first", "remove"), ("second", "remove"))]  # fmt: skip
    records.write(tmp_path, "cats", alike)
    left_out = select.apply(tmp_path, Filters())
    assert left_out == dict.fromkeys(select.REASONS, 0) | {"unmapped_edit_type": 1, "duplicate": 1}
    assert list(records.Records(tmp_path).manifest["unmapped"].values()) == [1]
    found = records.Records(tmp_path)
    assert [found[number].id for number in found.kept()] == ["first"]


def test_a_full_disk_leaves_the_set_readable(tmp_path):
    """A limit to the size of files stops the writing after any number of bytes, as a full disk does."""
    records.write(tmp_path, "cats", [record(0), record(1, width=255)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in itertools.count(0, 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            select.apply(tmp_path, Filters())
            break
        except OSError:
            continue
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert records.Records(tmp_path).kept().tolist() in ([0, 1], [0])
            assert not list(tmp_path.glob(".*.tmp"))
    assert limit > 500 and records.Records(tmp_path).kept().tolist() == [0]


def test_command(tmp_path):
    records.write(tmp_path / "cats", "cats", [record(0), record(1, height=100)])
    command = [sys.executable, "-m", "npedit_jax.data.select", "--records"]
    result = subprocess.run([*command, str(tmp_path / "cats")], capture_output=True, text=True, check=True)
    assert "1 kept" in result.stdout and '"small_image": 1' in result.stdout
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.startswith("select: no records in")


def test_edit_types_that_are_none_of_ours_are_counted_by_name(tmp_path, capsys, monkeypatch):
    found = record_sets.photograph_records(9, edit_types=("zoom_in", "remove", ""))
    record_sets.write(tmp_path / "set", found + record_sets.photograph_records(2, edit_types=("zoom_in",)))
    monkeypatch.setattr("sys.argv", ["select", "--records", str(tmp_path / "set"), "--min-side", "1"])
    assert select.main() == 0
    assert records.Records(tmp_path / "set").manifest["unmapped"] == {"zoom_in": 5, "(none)": 3}
    assert '{"zoom_in": 5, "(none)": 3}' in capsys.readouterr().out
    report.write(records.Records(tmp_path / "set"), tmp_path / "page.html")
    assert "<td>zoom_in</td><td>5</td>" in (tmp_path / "page.html").read_text()
