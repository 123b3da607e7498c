"""Records come back as they were written; damage is told apart from the rest, and never goes unnoticed."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npedit_jax.data import records, select
from npedit_jax.data.records import Record
from tests.data import bucket


def record(number: int, **changes) -> Record:
    fields = dict(
        image=bytes([number % 251]) * (100 + 37 * number),
        width=640 + number,
        height=480,
        instruction=f"remove the cat number {number}",
        edited_caption="an empty sofa",
        input_caption="a cat on a sofa",
        edit_type=("remove", "style")[number % 2],
        object="cat",
        id=f"cats-{number}",
        source="cats",
    )
    return Record(**(fields | changes))


texts = st.text(max_size=30)


@given(st.builds(Record, **{name: {bytes: st.binary(max_size=50), str: texts, int: st.integers(0, 2**40)}[kind]
                            for name, kind in records.FIELDS.items()}))  # fmt: skip
def test_any_record_comes_back(whole):
    assert records.decode(records.encode(whole)) == whole


@pytest.mark.parametrize("data", [b"", b"\x0a\x05wrong", b"plain text", records.encode(record(1))[:-20]])
def test_bytes_that_are_no_record(data):
    with pytest.raises(records.RecordError) as error:
        records.decode(data)
    assert error.value.reason == "schema"


def test_bytes_are_those_of_tensorflow():
    """A serialized tf.train.Example, written out by hand from its wire format."""
    example = records._Example()
    example.features.feature["id"].bytes_list.value.append(b"7")
    example.features.feature["width"].int64_list.value.append(300)
    field = lambda number, data: bytes([8 * number + 2, len(data)]) + data  # noqa: E731
    entry = lambda key, feature: field(1, field(1, key) + field(2, feature))  # noqa: E731
    both = entry(b"id", field(1, field(1, b"7"))) + entry(b"width", field(3, b"\x0a\x02\xac\x02"))
    assert example.SerializeToString(deterministic=True) == field(1, both)


def test_directory_of_records(tmp_path):
    written = [record(number) for number in range(23)]
    found = records.write(tmp_path / "cats", "cats", written, per_shard=10)
    assert len(found) == 23 and [found[number] for number in range(23)] == written
    manifest = json.loads((tmp_path / "cats" / "manifest.json").read_text())
    assert manifest["schema"] == 1 and manifest["count"] == manifest["kept"] == 23
    assert [shard["count"] for shard in manifest["shards"]] == [10, 10, 3]
    assert [shard["file"] for shard in manifest["shards"]] == [
        f"cats-train.array_record-0000{i}-of-00003" for i in range(3)
    ]
    assert found.index["width"].tolist() == [640 + number for number in range(23)]
    assert [found.edit_types[number] for number in found.index["edit_type"]] == [one.edit_type for one in written]
    assert found.index["instruction"].tolist() == [len(one.instruction) for one in written]
    assert len(set(found.index["content"].tolist())) == 23
    assert found.shards.damaged() == []
    assert sorted(path.name for path in (tmp_path / "cats").iterdir()) == sorted(
        ["manifest.json", "index.npz", *(shard["file"] for shard in manifest["shards"])]
    )
    with pytest.raises(FileExistsError):
        records.write(tmp_path / "cats", "cats", written)


def test_a_shard_is_written_over_that_of_a_run_which_was_stopped(tmp_path):
    path = tmp_path / records.shard_name("cats", 0, 1)
    path.write_bytes(b"an old shard")
    for number in range(2):
        records.write_shard(path, [record(number)])
    shards = records.Shards(tmp_path, [{"file": path.name, "count": 1}])
    assert shards[0] == record(1) and not list(tmp_path.glob(".*.tmp"))


def test_records_are_written_to_a_bucket_and_selected_there(tmp_path, monkeypatch):
    bucket.stand_in(monkeypatch, tmp_path)
    written = [record(0), record(1, width=255)]
    with pytest.raises(ValueError, match="mount the bucket of gs://bucket/cats"):
        records.write("gs://bucket/cats", "cats", written, per_shard=1)[0]
    assert select.apply("gs://bucket/cats", select.Filters())["small_image"] == 1
    mounted = records.Records(tmp_path / "bucket" / "cats")
    assert [mounted[0], mounted[1]] == written and mounted.kept().tolist() == [0] and not mounted.shards.damaged()
    names = {path.name for path in mounted.directory.iterdir()}
    assert names == {"manifest.json", "index.npz", *(shard["file"] for shard in mounted.manifest["shards"])}


def test_content_hash_tells_duplicates(tmp_path):
    first = record(0)
    same, other = dataclasses.replace(first, id="copy"), dataclasses.replace(first, instruction="paint the cat")
    index = records.write(tmp_path, "cats", [first, same, other]).index
    assert len(set(index["image"].tolist())) == 1
    assert index["content"][0] == index["content"][1] != index["content"][2]


def test_damage_is_found(tmp_path):
    rng = np.random.default_rng(0)
    written = [record(number, image=rng.bytes(70_000)) for number in range(6)]
    found = records.write(tmp_path, "cats", written, per_shard=3)
    first, second = (tmp_path / shard["file"] for shard in found.manifest["shards"])
    data = bytearray(first.read_bytes())
    data[100_000:100_020] = bytes(20)  # in the middle of the second record
    first.write_bytes(data)
    second.unlink()
    damaged = records.Records(tmp_path)
    assert damaged.shards.damaged() == [first.name, second.name]
    assert damaged[0] == written[0] and damaged[2] == written[2]
    for number in (1, 3, 4):
        with pytest.raises(records.RecordError, match=f"array_record-0000{number // 3}-of-00002#{number % 3}") as error:
            damaged[number]
        assert error.value.reason == "unreadable"


_FEW_FILES = """
import os, pickle, resource, sys
from npedit_jax.data import records
files = lambda: len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
before, shards = files(), pickle.loads(pickle.dumps(records.Records(sys.argv[1]).shards))
for _ in range(2):
    assert [shards[number].id for number in range(30)] == [f"cats-{number}" for number in range(30)]
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 128 and files() - before == 16, files() - before
other, taken = pickle.loads(pickle.dumps(shards)), []
try:
    while True:
        taken.append(open(os.devnull))
except OSError:
    pass
try:
    other[0]
    sys.exit("not told")
except OSError as error:
    assert "Too many open files; the limit of this process is 128: raise it" in str(error), error
taken.clear()
assert other[0].id == "cats-0"
"""


def test_more_shards_than_a_process_may_open_files(tmp_path):
    """A few are kept open; and where even these are too many, no record is taken for a bad one."""
    records.write(tmp_path, "cats", [record(number) for number in range(30)], per_shard=1)
    result = subprocess.run(
        [sys.executable, "-c", _FEW_FILES, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_number_past_the_end(tmp_path):
    found = records.write(tmp_path, "cats", [record(number) for number in range(3)], per_shard=2)
    for number in (-1, 3):
        with pytest.raises(IndexError, match=f"record {number} of 3"):
            found[number]


def test_directories_without_records_or_of_another_time(tmp_path):
    with pytest.raises(FileNotFoundError, match="no records in"):
        records.Records(tmp_path)
    found = records.write(tmp_path / "cats", "cats", [record(0)])
    manifest = tmp_path / "cats" / "manifest.json"
    manifest.write_text(json.dumps({**found.manifest, "schema": 2}))
    with pytest.raises(ValueError, match="schema 2"):
        records.Records(tmp_path / "cats")
    with pytest.raises(ValueError, match="mount the bucket of gs://bucket/cats"):
        records.Shards("gs://bucket/cats", found.manifest["shards"])
    manifest.write_text(json.dumps({**found.manifest, "count": 2}))
    with pytest.raises(ValueError, match="1 rows"):
        records.Records(tmp_path / "cats")


@pytest.mark.parametrize("file", ["manifest.json", "index.npz"])
@pytest.mark.parametrize("kept", [0, 40, -30])
def test_damaged_manifest_or_index_is_told_in_a_line(tmp_path, file, kept):
    records.write(tmp_path, "cats", [record(number) for number in range(3)])
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"manifest.json or index.npz in .* is damaged \(.*prepare it anew"):
        records.Records(tmp_path)
    (tmp_path / file).write_bytes(b"[1, 2]")
    with pytest.raises(ValueError, match="is damaged"):
        records.Records(tmp_path)


@pytest.mark.parametrize("field", ["schema", "count", "shards"])
def test_a_manifest_without_a_field_is_damaged_and_so_is_an_index_without_rows(tmp_path, field):
    found = records.write(tmp_path, "cats", [record(0)])
    manifest = {name: value for name, value in found.manifest.items() if name != field}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"is damaged .KeyError: '{field}'"):
        records.Records(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(found.manifest))
    np.savez(tmp_path / "index.npz", rows=np.zeros((), records.INDEX_TYPE))
    with pytest.raises(ValueError, match="is damaged .TypeError"):
        records.Records(tmp_path)


def test_an_index_of_before_objects_is_read(tmp_path):
    found = records.write(tmp_path, "cats", [record(0), record(2, object="")])
    assert found.index["object"].tolist() == [3, 0]
    older = [name for name in records.INDEX_TYPE.names if name != "object"]
    rows = np.array(found.index[older].tolist(), [(name, records.INDEX_TYPE[name]) for name in older])
    np.savez(tmp_path / "index.npz", rows=rows)
    assert records.Records(tmp_path).index["object"].tolist() == [-1, -1]
    assert records.Records(tmp_path).index[older].tolist() == found.index[older].tolist()
    assert select.apply(tmp_path, select.Filters())["no_object"] == 0  # the batches will tell


def test_the_page_tells_the_size_of_the_index():
    page = pathlib.Path(__file__).parents[2] / "docs" / "data.md"
    assert f"`index.npz`: {records.INDEX_TYPE.itemsize} bytes per record" in page.read_text()


def test_reading_needs_neither_tensorflow_nor_beam():
    program = (
        "import sys; import npedit_jax.data.records, npedit_jax.data.images; "
        "assert not {'tensorflow', 'apache_beam', 'tensorflow_datasets', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("module, missing", [("prepare", "apache_beam"), ("instructions", "openai")])
def test_a_command_without_its_extra_says_what_to_install(tmp_path, module, missing):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{missing}'\")")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", f"npedit_jax.data.{module}", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"{module}: No module named '{missing}'; pip install 'npedit_jax[{module}]'")
    assert len(result.stderr.splitlines()) == 1
