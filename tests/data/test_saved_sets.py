"""Data sets saved on disk by TensorFlow Datasets and by Hugging Face's library, where those are installed."""

import json

import pytest

from npedit_jax.data import layouts, records, saved_sets
from tests.data.photographs import picture, read, save


@pytest.fixture
def tfrecords(tmp_path):
    """A TensorFlow data set of seven of our records, its shards rewritten by Beam in TFDS's own default format."""
    pytest.importorskip("tensorflow_datasets")
    tfrecordio = pytest.importorskip("apache_beam.io.tfrecordio")
    from npedit_jax.data import prepare

    for name in ("china", "coffee"):
        (tmp_path / name).write_bytes(read(name))
    items = [{"image": ("china", "coffee")[n % 2], "instruction": f"prompt {n}"} for n in range(7)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    found = prepare.prepare(
        layouts.layout("folder", [str(tmp_path / "items.json")]), "photos", tmp_path / "out", per_shard=3
    )
    first = 0
    for shard in found.manifest["shards"]:
        path = found.directory / shard["file"]
        with path.with_name(path.name.replace("array_record", "tfrecord")).open("wb") as file:
            for number in range(first, first + shard["count"]):
                tfrecordio._TFRecordUtil.write_record(file, records.encode(found[number]))
        first += shard["count"]
        path.unlink()
    for name in ("dataset_info.json", "features.json"):
        path = found.directory / name
        path.write_text(path.read_text().replace("array_record", "tfrecord"))
    return found.directory


def test_tfrecords_are_read_in_any_order(tfrecords):
    opened = saved_sets.open_tfds(str(tfrecords))
    assert len(opened) == 7
    for number in (0, 1, 2, 3, 6, 6, 2, 4, 0):
        assert opened[number]["instruction"].decode() == f"prompt {number}"
        assert bytes(opened[number]["image"]) == read(("china", "coffee")[number % 2])
    layout = layouts.layout("tfds", [str(tfrecords)], fields={"input_caption": "instruction"})
    found = [record for span in layout.spans(2) for record in layout.records(span, "set")]
    assert [record.input_caption for record in found] == [f"prompt {number}" for number in range(7)]


def test_damage_to_tfrecords_is_told(tfrecords):
    file = tfrecords / "edits-train.tfrecord-00001-of-00003"
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[:1000], whole[:5], whole[:5000] + b"\0\0\0" + whole[5003:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="tfrecord-00001-of-00003.*(cut off or damaged)"):
            list(saved_sets.open_tfds(str(tfrecords)))


def test_hugging_face_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"image": [save(picture(name)) for name in ("china", "coffee")], "prompt": ["one", "two"]}
    ).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    for name in ("saved", "splits", "splits/train"):
        layout = layouts.layout("huggingface", [str(tmp_path / name)], fields={"instruction": "prompt"})
        found = [record for span in layout.spans(1) for record in layout.records(span, "hub")]
        assert [record.instruction for record in found] == ["one", "two"]
        assert found[1].image == save(picture("coffee")) and found[1].source == "hub"
    datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "only"))
    assert len(saved_sets.open_huggingface(str(tmp_path / "only"))) == 2
    datasets.DatasetDict({"validation": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="has the splits .'test', 'validation'. and none called train"):
        saved_sets.open_huggingface(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="and no 'train'"):
        saved_sets.open_huggingface(str(tmp_path / "other"), "train")
    with pytest.raises(ValueError, match="holds rows and no splits"):
        saved_sets.open_huggingface(str(tmp_path / "saved"), "train")
    layout = layouts.layout("huggingface", [str(tmp_path / "other")], fields={"instruction": "prompt"}, split="test")
    assert [one.instruction for span in layout.spans(1) for one in layout.records(span, "hub")] == ["two"]


def test_hugging_face_labels_have_their_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Value("binary"), "edit_type": datasets.ClassLabel(names=["style", "remove"])}
    columns = {"image": [save(picture("china"))] * 3, "edit_type": [1, 0, None]}
    rows = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
    rows.save_to_disk(str(tmp_path / "saved"))
    layout = layouts.layout("huggingface", [str(tmp_path / "saved")])
    found = [record.edit_type for span in layout.spans(2) for record in layout.records(span, "hub")]
    assert found == ["remove", "style", ""]


def test_tensorflow_labels_have_their_names(tfrecords):
    path = tfrecords / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["width"] = {
        "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": "641"},
    }
    path.write_text(json.dumps(features))
    (tfrecords / "width.labels.txt").write_text("\n".join(f"w{number}" for number in range(641)) + "\n")
    opened = saved_sets.open_tfds(str(tfrecords))
    assert [opened[number]["width"] for number in (0, 1)] == ["w640", "w600"] and len(opened) == 7
    assert len(saved_sets.open_tfds(str(tfrecords), "train")) == 7
    with pytest.raises(ValueError, match="and no 'test'"):
        saved_sets.open_tfds(str(tfrecords), "test")
