"""Preparation through Beam and TensorFlow Datasets, where the extra `prepare` is installed."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("apache_beam")
pytest.importorskip("tensorflow_datasets")

from npedit_jax.data import layouts, prepare, records, select
from tests.data import bucket
from tests.data.photographs import PHOTOGRAPHS, read


@pytest.fixture
def edits(tmp_path):
    """25 items of the release's layout; two of them broken."""
    (tmp_path / "images").mkdir()
    for name, path in PHOTOGRAPHS.items():
        (tmp_path / "images" / path.name).write_bytes(read(name))
    (tmp_path / "images" / "cut.jpg").write_bytes(b"")
    names = [path.name for path in PHOTOGRAPHS.values()]
    items = [
        dict(
            id=f"item-{number}",
            input_image_path=names[number % 8],
            edit_instruction=f"remove thing {number}",
            edited_caption="without it",
            input_description="with it",
            edit_type="remove" if number % 3 else "style",
            category="thing",
            dataset_source="test",
        )
        for number in range(25)
    ]
    items[7]["input_image_path"], items[13]["input_image_path"] = "cut.jpg", "gone.jpg"
    items[21]["edit_instruction"] = items[20]["edit_instruction"]
    items[21]["input_image_path"] = items[20]["input_image_path"]
    items[22]["edit_instruction"] = ""
    (tmp_path / "merged_edit_data.json").write_text(json.dumps(items))
    return tmp_path


def prepared(edits, **options):
    layout = layouts.layout("release", [str(edits / "merged_edit_data.json")], str(edits / "images"))
    return prepare.prepare(layout, "tiny", edits / "out", per_shard=6, **({"max_rejected_share": 0.1} | options))


def test_records_are_the_items_in_order(edits):
    found = prepared(edits)
    assert found.directory == edits / "out" / "edits" / "tiny" / "1.0.0"
    assert [found[number].id for number in range(len(found))] == [f"item-{n}" for n in range(25) if n not in (7, 13)]
    assert found[0].image == read("china") and (found[0].width, found[0].height) == (640, 427)
    manifest = found.manifest
    assert manifest["rejected"] == {"empty": 1, "missing_file": 1}
    assert [shard["count"] for shard in manifest["shards"]] == [6, 5, 5, 6, 1] and found.shards.damaged() == []
    assert manifest["left_out"] == dict.fromkeys(select.REASONS, 0) | {"duplicate": 1, "no_instruction": 1}
    assert manifest["kept"] == 21 and len(found.kept()) == 21
    rejected = [json.loads(line) for line in (found.directory / prepare.REJECTED).read_text().splitlines()]
    assert [item["reason"] for item in rejected] == ["empty", "missing_file"]
    assert "gone.jpg" in rejected[1]["message"]
    files = {path.name for path in found.directory.iterdir()}
    assert files == {"manifest.json", "index.npz", "rejected.jsonl", "dataset_info.json", "features.json"} | {
        shard["file"] for shard in manifest["shards"]
    }


def test_workers_in_processes_of_their_own(edits):
    alone = prepared(edits).manifest
    (edits / "out").rename(edits / "alone")
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    assert prepared(edits, beam_options=options).manifest == alone


def test_a_span_may_be_written_again(edits):
    """Beam does so where a worker was lost, or thought to be."""
    layout = layouts.layout("release", [str(edits / "merged_edit_data.json")], str(edits / "images"))
    span, whole = layout.spans(8)[0], {}
    for attempt in range(2):
        prepare.write_span(layout, "tiny", str(edits), "shard", span)
        whole[attempt] = {path.name: path.read_bytes() for path in edits.glob("*shard*")}
    assert whole[0] == whole[1] and set(whole[0]) == {"shard", "shard.json", "shard.npz", "shard.rejected.jsonl"}


def test_a_bucket_gets_the_same_records(edits, tmp_path, monkeypatch):
    bucket.stand_in(monkeypatch, tmp_path)
    layout = layouts.layout("release", [str(edits / "merged_edit_data.json")], str(edits / "images"))
    with pytest.raises(ValueError, match="mount the bucket"):  # they are read by path
        prepare.prepare(layout, "tiny", "gs://bucket/out", per_shard=6, max_rejected_share=0.1).shards  # noqa: B018
    here, there = prepared(edits).directory, tmp_path / "bucket" / "out" / "edits" / "tiny" / "1.0.0"
    files = {path.name: path.read_bytes() for path in here.iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == files and records.Records(there)[
        0
    ].id == "item-0"


def test_tensorflow_datasets_reads_the_result(edits):
    import tensorflow_datasets as tfds

    found = prepared(edits)
    builder = tfds.builder_from_directory(found.directory)
    assert builder.info.splits["train"].num_examples == 23
    rows = builder.as_data_source(split="train")
    assert rows[4]["id"].decode() == found[4].id and bytes(rows[4]["image"]) == found[4].image
    assert int(rows[4]["width"]) == found[4].width
    again = layouts.layout("tfds", [str(found.directory)])
    copies = [record for span in again.spans(10) for record in again.records(span, "copy")]
    assert copies == [found[number] for number in range(23)]


def test_a_set_is_there_with_its_filters_or_not_at_all(edits, monkeypatch):
    monkeypatch.setattr(select, "apply", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(edits)
    assert not list((edits / "out").rglob("manifest.json"))


def test_too_many_rejected_items_end_it_with_the_count(edits):
    with pytest.raises(prepare.TooManyRejected, match="2 of 25 items became no record.*gone.jpg"):
        prepared(edits, max_rejected_share=0.05)
    assert not (edits / "out" / "edits" / "tiny" / "1.0.0").exists()


def test_command(edits):
    command = [sys.executable, "-m", "npedit_jax.data.prepare", "--layout", "release", "--name", "tiny"]
    command += ["--input", str(edits / "merged_edit_data.json"), "--root", str(edits / "images")]
    command += ["--output", str(edits / "out"), "--min-side", "420", "--beam=--runner=DirectRunner"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "--max-rejected-share" in result.stderr.splitlines()[-1]
    result = subprocess.run([*command, "--max-rejected-share", "0.1"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1].split(": ", 1)[1])
    assert told["count"] == 23 and told["left_out"]["small_image"] == 7  # of chelsea and coffee, one of them twice
    written = edits / "out" / "edits" / "tiny" / "1.0.0"
    assert records.Records(written).manifest["filters"]["min_side"] == 420
    result = subprocess.run([*command, "--max-rejected-share", "0.1"], capture_output=True, text=True, check=False)
    told = f"prepare: {written} is there already; delete it or give another --name"
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == told and not result.stdout


def test_command_of_wrong_inputs_tells_in_one_line(edits, monkeypatch, capsys):
    arguments = ["prepare", "--name", "tiny", "--output", str(edits / "out"), "--input", str(edits)]
    monkeypatch.setattr("sys.argv", [*arguments, "--layout", "huggingface"])
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    assert prepare.main() == 1 and "datasets" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("sys.argv", [*arguments, "--layout", "folder", "--per-shard", "0"])
    assert prepare.main() == 1 and "--per-shard must be 1 or more; found 0" in capsys.readouterr().err
    (edits / "cut.json").write_text('[{"id": 1}, {"id"')
    monkeypatch.setattr("sys.argv", [*arguments[:-1], str(edits / "cut.json"), "--layout", "release"])
    assert prepare.main() == 1 and "cut.json: the object" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("sys.argv", [*arguments, "--layout", "folder", "--field", "instruction"])
    with pytest.raises(SystemExit):
        prepare.main()
    assert "--field takes OURS=THEIRS" in capsys.readouterr().err
    assert not (edits / "out").exists() or not list((edits / "out").rglob("manifest.json"))
