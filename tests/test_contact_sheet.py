"""Sheets of edits: what lies where, and what is told below it."""

import numpy as np
import pytest
from PIL import Image

from npedit_jax import contact_sheet
from npedit_jax.contact_sheet import Cell

COLORS = ((255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 200, 0), (0, 200, 200))


def rows(count, size=(64, 64)):
    """Rows of a black reference and an edit of the row's own colour."""
    return [
        (f"paint it {number}", [Cell(Image.new("RGB", size)), Cell(Image.new("RGB", size, color), ("done 0.90",))])
        for number, color in enumerate(COLORS[:count])
    ]


def places(sheet):
    """Top left and bottom right corners of each colour."""
    pixels, found = np.asarray(sheet), []
    for color in COLORS:
        y, x = np.nonzero((pixels == color).all(axis=-1))
        if len(y):
            found.append((y.min(), x.min(), y.max() + 1, x.max() + 1))
    return found


@pytest.mark.parametrize(("count", "abreast", "columns"), [(5, 1, 1), (5, 2, 2), (1, 2, 1), (4, 3, 3)])
def test_rows_stand_side_by_side_in_their_order(count, abreast, columns):
    sheet = contact_sheet.draw(rows(count), abreast)
    found = places(sheet)
    assert len(found) == count and all(bottom - top == right - left == 192 for top, left, bottom, right in found)
    assert found == sorted(found)
    assert len({left for _, left, _, _ in found}) == min(columns, count)
    assert all(right < sheet.width and bottom + 19 < sheet.height for _, _, bottom, right in found)
    assert not (np.asarray(sheet)[-8:] < 200).any(), "room below the last line"


def test_large_pictures_are_made_smaller_and_ragged_ones_keep_their_shape():
    (title, cells), (_, others) = rows(1, (1024, 512))[0], rows(2, (300, 600))[1]
    (top, left, bottom, right), (above, before, below, behind) = places(
        contact_sheet.draw([(title, cells), ("", others)])
    )
    assert (right - left, bottom - top) == (384, 192)
    assert (behind - before, below - above) == (round(300 * 0.375), round(600 * 0.375)) and above > bottom


def test_a_long_title_is_cut_at_the_edge_of_its_row():
    words = "replace the very small circle in the upper left with a large rectangle " * 3
    ((_, cells),) = rows(1)
    sheet = np.asarray(contact_sheet.draw([(words, cells)] * 2, 2).convert("L"))
    middle = sheet.shape[1] // 2
    assert (sheet[:45, middle - 120 : middle - 16] < 128).any()
    assert not (sheet[:45, middle - 8 : middle + 8] < 128).any(), "the first title runs into the second"


@pytest.mark.parametrize(
    ("done", "kept", "line"),
    [
        (0.894, 0.5, ("done 0.89, rest kept 0.50",)),
        (None, 1.0, ("rest kept 1.00",)),
        (0.0, None, ("done 0.00",)),
        (None, None, ()),
    ],
)
def test_scores_tell_what_was_asked(done, kept, line):
    assert contact_sheet.scores(done, kept) == line
