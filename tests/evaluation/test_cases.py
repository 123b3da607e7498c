"""The benchmarks' own files, in the forms in which they are published, and what is wrong with others."""

import dataclasses
import io
import json

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from npedit_jax.evaluation import cases


def picture(size=(20, 10), seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))


def png(image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def write_gedit(directory, tasks=("style_change", "subject-remove"), count=4, files=2) -> None:
    """Parquet files of several row groups as the Hub has them, one row per picture and language."""
    (directory / "data").mkdir(parents=True)
    number = 0
    for part in range(files):
        rows = []
        for _ in range(count):
            for language, words in (("en", "make the circle red"), ("cn", "把圆变红")):
                image = {"bytes": png(picture((20 + number, 10), number)), "path": None}
                rows.append(
                    dict(
                        task_type=tasks[number % len(tasks)],
                        key=f"{number:032x}",
                        instruction=words,
                        instruction_language=language,
                        input_image=image,
                        input_image_raw=image,
                        Intersection_exist=True,
                    )
                )
            number += 1
        file = directory / "data" / f"train-{part:05d}-of-{files:05d}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=3)


def test_gedit_in_both_languages_with_the_layout_of_its_scorer(tmp_path):
    write_gedit(tmp_path)
    found = cases.gedit(tmp_path)
    assert len(found) == 16 and len({case.key for case in found}) == 16
    assert found[0].key == f"fullset/style_change/en/{0:032x}" and found[0].part == "en"
    assert found[1].key == f"fullset/style_change/cn/{0:032x}" and found[1].instruction == "把圆变红"
    for number in (0, 15, 7, 8):  # of several row groups and files, in whatever order
        expected = picture((20 + number // 2, 10), number // 2)
        np.testing.assert_array_equal(np.asarray(found[number].read()), np.asarray(expected))
    assert {case.part for case in cases.gedit(tmp_path, ["en"])} == {"en"}


def test_digest_tells_cases_of_one_key_apart():
    case = cases.Case("a", "task", "make it red", picture, edit_type="remove", object="cat", mask=picture)
    others = [dict(instruction="make it blue"), dict(object="dog"), dict(edit_type=""), dict(mask=None)]
    others += [dict(mask=lambda: picture(seed=1))]
    found = [cases.digest(case, picture())]
    assert found == [cases.digest(dataclasses.replace(case, key="b"), picture())]
    found += [cases.digest(dataclasses.replace(case, **change), picture()) for change in others]
    turned = Image.frombytes("RGB", (10, 20), picture().tobytes())
    found += [cases.digest(case, image) for image in (picture(seed=2), turned)]
    assert len(set(found)) == len(found) == 8


def test_gedit_files_that_do_not_fit_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no parquet files"):
        cases.gedit(tmp_path)
    with pytest.raises(ValueError, match=r"unknown languages \['de'\]"):
        cases.gedit(tmp_path, ["de"])
    parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="lacks the columns .*task_type"):
        cases.gedit(tmp_path)
    (tmp_path / "other.parquet").unlink()
    write_gedit(tmp_path, tasks=("../../etc",))
    with pytest.raises(ValueError, match="cannot name a file"):
        cases.gedit(tmp_path)


def test_rows_of_gedit_that_are_no_cases_are_numbered(tmp_path):
    write_gedit(tmp_path, count=1, files=1)
    (file,) = tmp_path.rglob("*.parquet")
    first = parquet.read_table(file).to_pylist()[0]
    for column, value in {"key": None, "task_type": 7, "instruction": None}.items():
        parquet.write_table(pyarrow.Table.from_pylist([first | {column: value}]), file)
        with pytest.raises(ValueError, match=rf"of-00001.parquet row 0: \['{column}'\] are no texts"):
            cases.gedit(tmp_path)
    for value in (None, {"bytes": None, "path": "a.png"}, "a.png"):
        parquet.write_table(pyarrow.Table.from_pylist([first | {"input_image_raw": value}]), file)
        (case,) = cases.gedit(tmp_path)
        with pytest.raises(ValueError, match="input_image_raw of .*of-00001.parquet row 0 holds no picture"):
            case.read()


def write_dreambooth(directory) -> None:
    """Two subjects, one of them alive, in the form of prompts_and_classes.txt."""
    prompts = "'a {{0}} {{1}} {0}'.format(unique_token, class_token)"
    lists = [[prompts.format(words) for words in kind] for kind in (("in the jungle", "on a rug"), ("in a hat",))]
    text = "Classes\n\nsubject_name,class\nbear_plushie,stuffed animal\ndog2,dog\n\nPrompts\n"
    for name, lines in zip(("Object", "Live Subject"), lists, strict=True):
        text += f"\n{name} Prompts\n\nprompt_list = [\n" + ",\n".join(lines) + "\n]\n"
    (directory / "prompts_and_classes.txt").write_text(text)
    for number, subject in enumerate(("bear_plushie", "dog2")):
        (directory / subject).mkdir()
        for name in ("01.jpg", "00.jpg"):
            picture(seed=number).save(directory / subject / name)


def test_dreambooth_takes_each_subjects_own_prompts(tmp_path):
    write_dreambooth(tmp_path)
    found = cases.dreambooth(tmp_path)
    assert [(case.key, case.instruction, case.object) for case in found] == [
        ("bear_plushie/00", "a stuffed animal in the jungle", "stuffed animal"),
        ("bear_plushie/01", "a stuffed animal on a rug", "stuffed animal"),
        ("dog2/00", "a dog in a hat", "dog"),
    ]
    assert found[2].read().size == (20, 10)
    (tmp_path / "dog2" / "00.jpg").unlink()
    (tmp_path / "dog2" / "01.jpg").unlink()
    with pytest.raises(ValueError, match="dog2 holds no .jpg"):
        cases.dreambooth(tmp_path)
    (tmp_path / "prompts_and_classes.txt").write_text("Classes\n")
    with pytest.raises(ValueError, match="another form"):
        cases.dreambooth(tmp_path)


def test_other_braces_in_a_prompt_are_words(tmp_path):
    write_dreambooth(tmp_path)
    file = tmp_path / "prompts_and_classes.txt"
    file.write_text(file.read_text().replace("in a hat", "in a {2} {hat}"))
    assert cases.dreambooth(tmp_path)[2].instruction == "a dog in a {2} {hat}"


def test_folder_of_pictures(tmp_path):
    picture().save(tmp_path / "a.png")
    lines = [{"image": "a.png", "instruction": "make the circle red"}]
    lines += [{"image": "a.png", "instruction": "remove the circle", "task": "remove", "key": "x", "mask": "a.png"}]
    (tmp_path / "instructions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = cases.folder(tmp_path)
    assert (first.key, second.key, second.task) == ("all/00001", "remove/x", "remove")
    assert first.mask is None and second.mask().size == (20, 10)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nothing", "no JSON"),
        ("[1]", "expected a JSON object"),
        ({"image": "a.png"}, "image or instruction is missing"),
        ({"image": "b.png", "instruction": ""}, "b.png is not there"),
        ({"image": "../a.png", "instruction": ""}, "does not lie below"),
        ({"image": "/etc/passwd", "instruction": ""}, "does not lie below"),
        ({"image": "a.png", "instruction": "", "key": "../../x"}, "cannot name a file"),
        ({"image": "a.png", "instruction": "", "seed": 1}, "unknown or no text"),
        ({"image": "a.png", "instruction": "", "key": "00001"}, "is line 1's already"),
    ],
    ids=str,
)
def test_bad_line_is_numbered(tmp_path, line, told):
    picture().save(tmp_path / "a.png")
    good = json.dumps({"image": "a.png", "instruction": "make the circle red"})
    (tmp_path / "instructions.jsonl").write_text(good + "\n" + (line if isinstance(line, str) else json.dumps(line)))
    with pytest.raises(ValueError, match="line 2: .*" + told):
        cases.folder(tmp_path)


def test_picture_that_does_not_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture())[:60])
    (tmp_path / "instructions.jsonl").write_text(json.dumps({"image": "a.png", "instruction": "make the circle red"}))
    with pytest.raises(ValueError, match="case all/00001: .* does not decode"):
        list(cases.iterate(cases.folder(tmp_path)))
