"""Whether an edit of an easy-VQA image was carried out, and what it changed besides, read from the pixels alone.

Images are uint8 [H, W, 3]; a mask is bool [H, W]; colours and errors are in pixel values, 0 to 255.
"""

import dataclasses

import numpy as np

from npedit_jax.data.easyvqa import COLORS, EDIT_TYPES, Edit
from npedit_jax.data.easyvqa_reading import GROUND_DISTANCE, Reading, color_distances, ground_distance, read

COLOR_DISTANCE = 100  # RGB distance to a palette colour up to which a pixel can count as that colour


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Whether the edit was carried out, and the mean absolute difference (0 to 255) on the pixels that had to stay."""

    done: bool
    kept_error: float


def judge(reference: np.ndarray, edited: np.ndarray, edit: Edit) -> Judgement:
    """Judges one edit.

    Args:
        reference: uint8 [H, W, 3], the image before the edit.
        edited: uint8 [H, W, 3], what the editor made of it.
        edit: what was asked; recolor and replace name the shape they want in `target`.
    """
    return judge_reading(reference, read(reference), edited, edit)


def judge_reading(reference: np.ndarray, before: Reading, edited: np.ndarray, edit: Edit) -> Judgement:
    """`judge` with the reference read beforehand: for many edits of one image."""
    if reference.shape != edited.shape:
        raise ValueError(f"reference {list(reference.shape)} and edit {list(edited.shape)} must have one size")
    if not before.mask.any():
        raise ValueError("the reference shows no shape: no edit of it can be judged")
    after = read(edited)
    match edit.edit_type:
        case "recolor":
            done = recolored(reference, before, edited, after, edit.target.color)
        case "remove":
            done = removed(before, edited, after)
        case "replace":
            done = replaced(before, after, edit.target.kind)
        case "nothing":
            done = after.color == before.color and overlap(before.mask, after.mask) > 0.8
        case other:
            raise ValueError(f"expected one of the edit types {EDIT_TYPES}; found {other!r}")
    free = before.mask | after.mask if edit.edit_type == "replace" else before.mask
    return Judgement(bool(done), mean_difference(reference, edited, ~dilate(free)))


def recolored(reference: np.ndarray, before: Reading, edited: np.ndarray, after: Reading, color: str) -> bool:
    """At least 70 % of the old shape's solid pixels have the new colour, and the shape stayed where it was (IoU > 0.6).

    Solid are the pixels near the shape's median colour. The anti-aliased rim is left out: it is a third of a small
    shape, and its mixed colours are nearest to gray whatever the shape's own colour is.
    """
    shape_rgb = np.median(reference[before.mask], axis=0).astype(np.float32)
    solid = before.mask & (ground_distance(reference, shape_rgb) <= GROUND_DISTANCE)
    distances = color_distances(edited[solid])
    asked = COLORS.index(color)
    hits = (distances.argmin(-1) == asked) & (distances[:, asked] <= COLOR_DISTANCE)
    return hits.mean() >= 0.7 and overlap(before.mask, after.mask) > 0.6


def removed(before: Reading, edited: np.ndarray, after: Reading) -> bool:
    """At least 85 % of the old shape's pixels look like the old ground, little of it is left, and no shape is new."""
    bare = (ground_distance(edited, before.ground) <= GROUND_DISTANCE)[before.mask].mean()
    left = np.count_nonzero(after.mask)
    elsewhere = np.count_nonzero(after.mask & ~dilate(before.mask))
    return bare >= 0.85 and left < 0.2 * np.count_nonzero(before.mask) + 8 and elsewhere <= 8


def replaced(before: Reading, after: Reading, kind: str) -> bool:
    """A shape of the asked kind and the old colour stands in the old one's place (their boxes overlap by IoU > 0.3)."""
    in_place = overlap(box_of(before.mask), box_of(after.mask)) > 0.3
    return after.kind == kind and after.color == before.color and in_place


def box_of(mask: np.ndarray) -> np.ndarray:
    """The bounding box of a mask, as a mask."""
    rows, columns = np.logical_or.accumulate(mask.any(1)), np.logical_or.accumulate(mask.any(0))
    rows &= np.logical_or.accumulate(mask.any(1)[::-1])[::-1]
    columns &= np.logical_or.accumulate(mask.any(0)[::-1])[::-1]
    return rows[:, None] & columns


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def dilate(mask: np.ndarray) -> np.ndarray:
    """Grows a mask by one pixel in all eight directions."""
    tall = mask.copy()
    tall[1:] |= mask[:-1]
    tall[:-1] |= mask[1:]
    grown = tall.copy()
    grown[:, 1:] |= tall[:, :-1]
    grown[:, :-1] |= tall[:, 1:]
    return grown


def mean_difference(reference: np.ndarray, edited: np.ndarray, where: np.ndarray) -> float:
    """Mean absolute difference of two uint8 images over a mask and the channels; 0 where the mask is empty."""
    count = np.count_nonzero(where)
    difference = np.abs(reference.astype(np.int16) - edited).sum(-1)
    return float(difference[where].sum() / (3 * count)) if count else 0.0
