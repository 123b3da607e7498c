"""The report: complete, self-contained, and safe against what instructions may hold."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from npedit_jax.data import easyvqa as dataset
from npedit_jax.data import easyvqa_edits
from npedit_jax.evaluation import easyvqa, report

METRICS = [
    {
        "step": 10 * number,
        "loss": 2.0 / number,
        "loss/dmd": 1.0 / number,
        "loss/scorer": None if number == 4 else 0.5 / number,
        "scorer/edit": 1 - 0.5 / number,
        "scorer/identity": 0.9,
        "time/data": 0.1,
    }
    for number in range(1, 31)
]


@pytest.fixture(scope="module")
def data():
    return dataset.load("test").fraction(0.008)


@pytest.fixture(scope="module")
def asked(data):
    return easyvqa.requests(data, seed=0)


@pytest.fixture(scope="module")
def edited(data, asked):
    return np.stack([easyvqa_edits.apply(data.images[x.index], x.edit) for x in asked])


def render(data, asked, edited, answers=True, **options):
    scores = easyvqa.score(data, asked, edited)
    if answers:
        scores = [item | {"scorer_edit": 0.875, "scorer_identity": 0.625} for item in scores]
    return report.render(data, asked, edited, scores, title="An editor", **options)


def test_the_sheet_has_a_row_of_each_image(data, asked, edited):
    scores = easyvqa.score(data, asked, edited)
    plain = report.sheet(data, asked, edited, scores, images=3)
    told = [item | {"scorer_edit": 0.875, "scorer_identity": 0.625} for item in scores]
    sheet = report.sheet(data, asked, edited, told, images=3)
    assert sheet.width == plain.width and sheet.height == plain.height + 3 * 19  # a line more under each row
    assert sheet.width > 5 * 192 and plain.height > 3 * 192
    corner = np.asarray(sheet)[16 : 16 + 192, 16 : 16 + 192]  # the first reference, three times as large
    np.testing.assert_array_equal(corner[::3, ::3], data.images[asked[0].index])


def test_shows_every_edit_with_its_instruction_answers_and_mark(data, asked, edited):
    copied = edited.copy()
    copied[0] = data.images[0]  # a recolor that was not done
    page = render(data, asked, copied, images=5)
    assert page.count("<img ") == 5 * 5
    for request in asked:
        assert (f"<figcaption>{request.edit.instruction}" in page) or request.index >= 5
    assert page.count("✓ done") == 19 and page.count("✗ not done") == 1
    assert page.count("P(yes), done: 0.88") == 15 and page.count("P(yes), there: 0.88") == 5
    assert page.count("P(yes), rest same: 0.62") == 20
    for name in (*dataset.EDIT_TYPES, "replace with a triangle"):
        assert f"<td>{name}</td>" in page
    assert "<td>87.5 %</td>" in page  # seven of the eight recolors


def test_pictures_are_the_pixels_themselves(data, asked, edited):
    page = render(data, asked, edited)
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    np.testing.assert_array_equal(pictures[0], data.images[0])
    np.testing.assert_array_equal(np.stack(pictures[1:5]), edited[:4])
    np.testing.assert_array_equal(pictures[5], data.images[1])


def test_needs_nothing_from_outside(data, asked, edited):
    page = render(data, asked, edited, metrics=METRICS)
    addresses = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    assert "<script" not in page and "@import" not in page
    assert "image-rendering: pixelated" in page and "prefers-color-scheme: dark" in page


def test_curves_show_losses_and_scores_only(data, asked, edited):
    drawing = report.curves(METRICS)
    assert drawing.count("<svg") == 1
    for text in ("loss: dmd", "loss: scorer", ">edit<", ">identity<"):
        assert text in drawing
    assert "time" not in re.findall(r">([^<>]*)</text>", drawing) and report.INK not in drawing
    assert "currentColor" in drawing and drawing == report.curves(METRICS)
    assert ">loss<" in report.curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert report.curves([{"step": 1, "time/data": 0.1}]) is None
    assert "<svg" not in render(data, asked, edited)


def test_leaves_out_answers_that_nobody_gave(data, asked, edited):
    assert "P(yes)" not in render(data, asked, edited, answers=False)


def test_text_is_no_markup(data, asked, edited):
    edit = dataclasses.replace(asked[0].edit, instruction='<b onclick="x">&')
    page = render(data, [dataclasses.replace(asked[0], edit=edit), *asked[1:]], edited)
    assert "<b onclick" not in page and "&lt;b onclick=&#34;x&#34;&gt;&amp;" in page
