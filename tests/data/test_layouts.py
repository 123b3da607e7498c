"""Items of every layout, cut into spans anywhere, and what becomes of broken ones."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npedit_jax.data import edit_types, layouts
from npedit_jax.data.layouts import Rejected
from npedit_jax.data.records import Record
from tests.data.photographs import read

values = st.recursive(
    st.text(max_size=12) | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)  # fmt: skip
objects = st.lists(st.dictionaries(st.text(max_size=8), values, max_size=4), min_size=1, max_size=12)


@given(objects, st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([None, 1, 4]))
def test_spans_hold_every_item_once(tmp_path_factory, found, per_span, lines, ascii, indent):
    path = tmp_path_factory.mktemp("items") / "items.json"
    if lines:
        text = "\n\n".join(json.dumps(item, ensure_ascii=ascii) for item in found)
    else:
        text = "\n " + json.dumps(found, ensure_ascii=ascii, indent=indent)
    path.write_text(text, encoding="utf-8")
    reader = layouts.TextReader()
    spans = list(reader.spans(str(path), per_span))
    parts = [[item.data for item in reader.items(span)] for span in spans]
    assert [item for part in parts for item in part] == found
    assert [len(part) for part in parts[:-1]] == [per_span] * (len(parts) - 1)


def test_items_across_blocks(monkeypatch):
    monkeypatch.setattr(layouts, "_BLOCK", 7)
    found = [{"a": "x" * number, "b": {"c": '"}{\\'}} for number in range(40)]
    data = json.dumps(found).encode()
    assert [json.loads(part) for _, part in layouts._objects(io.BytesIO(data), 0, None)] == found


def test_broken_json_is_told_by_its_place(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": 1}\n{"id": 2\n[3]\n{"id": 4}\n')
    reader = layouts.TextReader()
    items = [item for span in reader.spans(str(path), 10) for item in reader.items(span)]
    assert [item.data for item in items] == [{"id": 1}, None, None, {"id": 4}]
    assert items[1].place == f"{path}@10"
    path.write_text('\n[1]\n{"id": 2}\n')  # lines, although the first is a list
    assert [item.data for span in reader.spans(str(path), 10) for item in reader.items(span)] == [None, {"id": 2}]
    whole = tmp_path / "items.json"
    whole.write_text('[{"id": 1}, {"id": }, null, {"id": 3}, [' + "[" * 10**5 + ']{"id": 4}, "x" ]')
    for per_span in (1, 2, 10):
        items = [item for span in reader.spans(str(whole), per_span) for item in reader.items(span)]
        assert [item.data for item in items] == [{"id": 1}, None, None, {"id": 3}, None, {"id": 4}, None]


@given(objects, st.data())
def test_a_list_that_is_cut_off_is_an_error(tmp_path_factory, found, data):
    """Not a shorter list: what is missing cannot be counted."""
    text = json.dumps(found).encode()
    path = tmp_path_factory.mktemp("items") / "items.json"
    path.write_bytes(text[: data.draw(st.integers(1, len(text) - 1))])
    with pytest.raises(ValueError, match="items.json: the .* (does not end|is cut off)"):
        list(layouts.TextReader().spans(str(path), 3))


def test_a_text_without_its_end_swallows_no_items(tmp_path):
    path = tmp_path / "items.json"
    path.write_text('[{"id": "a}, {"id": "b"}, {"id": "c"}]')
    with pytest.raises(ValueError, match="the object that begins at byte 1 does not end"):
        list(layouts.TextReader().spans(str(path), 3))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "omniedit" / "removal" / "metadata").mkdir(parents=True)
    (tmp_path / "omniedit" / "removal" / "input").mkdir()
    for name in ("china.jpg", "omniedit/removal/input/7.jpg"):
        (tmp_path / name).write_bytes(read("china"))
    return tmp_path


def records_of(kind, root, items, name="items.jsonl", **options):
    path = root / name
    path.write_text(json.dumps(items) if name.endswith(".json") else "\n".join(map(json.dumps, items)))
    layout = layouts.layout(kind, [str(path)], str(root), **options)
    return [found for span in layout.spans(2) for found in layout.records(span, "set")]


def expected(**fields):
    texts = dict.fromkeys(("instruction", "edited_caption", "input_caption", "edit_type", "object", "id"), "")
    return Record(image=read("china"), width=640, height=427, **(texts | {"source": "set"} | fields))


def test_release(root):
    item = dict(
        id=12,
        input_image_path="china.jpg",
        edit_instruction="remove the temple ",
        edited_caption="a garden",
        input_description="a temple",
        edit_type="Local color change",
        category="temple",
        width=1,
        dataset_source="pico",
    )
    assert records_of("release", root, [item], "merged_edit_data.json") == [
        expected(
            instruction="remove the temple",
            edited_caption="a garden",
            input_caption="a temple",
            edit_type="local_color_change",
            object="temple",
            id="12",
            source="pico",
        )
    ]


def test_pico_banana(root):
    item = dict(
        open_image_input_url="https://example.com/1.jpg",
        local_input_image="china.jpg",
        text="Remove the red flag.",
        output_image="images/positive-edit/17.png",
        edit_type="Remove an existing object",
        summarized_text="Flag removed.",
    )
    zoom = item | {"edit_type": "Zoom in", "output_image": "images/positive-edit/18.png"}
    assert records_of("pico_banana", root, [item, zoom]) == [
        expected(instruction="Remove the red flag.", edit_type="remove", id="17"),
        expected(instruction="Remove the red flag.", edit_type="zoom_in", id="18"),
    ]


def test_gpt_image_edit(root):
    item = dict(
        id="omniedit_removal_7",
        dataset_source="omniedit",
        task="removal",
        input="input/7.jpg",
        output="output/7.jpg",
        instruction="remove it",
        instruction_type="original",
        input_description="a temple",
    )
    (root / "omniedit" / "removal" / "metadata" / "omniedit_removal.json").write_text(json.dumps([item]))
    layout = layouts.layout("gpt_image_edit", [str(root / "*" / "*" / "metadata" / "*.json")])
    assert [found for span in layout.spans(5) for found in layout.records(span, "set")] == [
        expected(
            instruction="remove it",
            input_caption="a temple",
            edit_type="remove",
            id="omniedit_removal_7",
            source="omniedit",
        )
    ]


def test_plain_folder_with_fields_of_other_names(root):
    item = dict(file_name="china.jpg", prompt="make it night", kind="background change", id=3)
    found = records_of("folder", root, [item], fields={"instruction": "prompt", "edit_type": "kind"})
    assert found == [expected(instruction="make it night", edit_type="background_change", id="3")]


def test_images_of_several_inputs_lie_beside_each(tmp_path):
    for folder, photograph in (("a", "china"), ("b", "flower")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.jpg").write_bytes(read(photograph))
        (tmp_path / folder / "i.jsonl").write_text('{"image": "p.jpg"}')
    layout = layouts.layout("folder", [str(tmp_path / "*" / "i.jsonl")])
    found = [one.image for span in layout.spans(5) for one in layout.records(span, "set")]
    assert found == [read("china"), read("flower")]


def test_customization_has_a_record_for_each_prompt(root):
    item = dict(image="china.jpg", prompts=["the temple in snow", "the temple at night"], object="temple", id="t")
    found = records_of("customization", root, [item, dict(image="china.jpg", prompt="the temple on mars")])
    assert [(one.instruction, one.edited_caption, one.edit_type) for one in found] == [
        (prompt, prompt, "customization") for prompt in (*item["prompts"], "the temple on mars")
    ]
    assert [one.id for one in found[:2]] == ["t/0", "t/1"] and len({one.id for one in found}) == 3


@pytest.mark.parametrize(
    "item, reason",
    [
        (dict(image="nowhere.jpg"), "missing_file"),
        (dict(instruction="x"), "no_image"),
        (dict(image=7), "no_image"),
        (dict(image="empty.jpg"), "empty"),
        (dict(image="page.jpg"), "unknown"),
        (dict(image="china.jpg", instruction=["a", "list"]), "json"),
        (dict(image="china.jpg", instruction="half a smile \ud83d"), "json"),
        (dict(image="half\ud83d.jpg"), "missing_file"),
        (dict(image="two\0.jpg"), "missing_file"),
        (dict(image="."), "missing_file"),
    ],
)
def test_items_that_become_no_record_say_why(root, item, reason):
    (root / "empty.jpg").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html>")
    good = dict(image="china.jpg")
    before, (place, error), after = records_of("folder", root, [good, item, good])
    assert isinstance(before, Record) and isinstance(after, Record)
    assert isinstance(error, Rejected) and error.reason == reason and place.startswith(str(root / "items.jsonl"))


def test_every_public_name_maps_to_a_type_of_ours():
    assert set(edit_types.PICO_BANANA.values()) | set(edit_types.GPT_IMAGE_EDIT.values()) <= set(edit_types.EDIT_TYPES)
    assert edit_types.from_pico_banana("Change an object’s attribute (e.g., color/material)") == "local_color_change"
    assert edit_types.from_pico_banana("Add new (handwritten/printed/etc) text") == "text"
    assert edit_types.from_pico_banana("Clothing edit (change color/outfit)") not in edit_types.EDIT_TYPES
    assert edit_types.plain("Shape-Change ") == "shape_change"


def test_patterns_may_be_relative(tmp_path, monkeypatch):
    (tmp_path / "part-0").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.json", "part-0/a.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for pattern, found in {
        "*.jsonl": ("a.jsonl", "b.jsonl"),
        "./a*": ("a.jsonl",),
        "part-*/a.jsonl": ("part-0/a.jsonl",),
        "part-0/*": ("part-0/a.jsonl",),
        f"{tmp_path}/*/*.jsonl": (f"{tmp_path}/part-0/a.jsonl",),
    }.items():
        assert layouts.layout("folder", [pattern]).paths == found


def test_rows_with_numbers_and_pixels_of_numpy():
    rows = [
        {"image": read("china"), "id": np.int64(7), "instruction": b"make it night"},
        {"image": np.zeros((4, 4, 3), np.uint8)},
    ]
    layout = layouts.Layout(("rows",), "", layouts.plain, layouts.RowReader(lambda path: rows))
    first, (place, error) = [found for span in layout.spans(5) for found in layout.records(span, "set")]
    assert first == expected(id="7", instruction="make it night")
    assert error.reason == "no_image" and "pixels of shape (4, 4, 3)" in str(error) and place == "rows[1]"


def test_unknown_layouts_and_paths(tmp_path):
    with pytest.raises(ValueError, match="'folder' has no splits; leave out 'test'"):
        layouts.layout("folder", [str(tmp_path)], split="test")
    with pytest.raises(ValueError, match="unknown layout 'zip'"):
        layouts.layout("zip", ["x"])
    for path in ("nowhere.json", "*/nothing.json"):
        with pytest.raises(FileNotFoundError):
            layouts.layout("folder", [str(tmp_path / path)])
