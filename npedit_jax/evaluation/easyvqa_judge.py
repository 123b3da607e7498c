"""Whether an edit of an easy-VQA image was carried out, and what it changed besides, read from the pixels alone.

An image holds one flat shape on a plain ground, so its content can be read off with a few distances and no network.
Images are uint8 [H, W, 3]; a mask is bool [H, W]; colours and errors are in pixel values, 0 to 255.
"""

import dataclasses

import numpy as np

from npedit_jax.data.easyvqa import COLORS, EDIT_TYPES, PALETTE, Edit, Shape

GROUND_DISTANCE = 60  # RGB distance to the ground from which on a pixel belongs to the shape
COLOR_DISTANCE = 100  # RGB distance to a palette colour up to which a pixel can count as that colour
PALETTE_RGB = np.array([PALETTE[color] for color in COLORS], np.float32)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an image shows.

    Attributes:
        ground: float32 [3], the plain ground's RGB.
        mask: bool [H, W], the pixels of the shape.
        color: name of the palette colour nearest to the shape's median; None where there is no shape.
        kind: "circle", "rectangle" or "triangle"; None where the outline is none of them, or there is no shape.
    """

    ground: np.ndarray
    mask: np.ndarray
    color: str | None
    kind: str | None

    @property
    def shape(self) -> Shape | None:
        """The colour and the kind together; None unless both were read."""
        return Shape(self.color, self.kind) if self.color and self.kind else None


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Whether the edit was carried out, and the mean absolute difference (0 to 255) on the pixels that had to stay."""

    done: bool
    kept_error: float


def read(image: np.ndarray) -> Reading:
    """Reads ground, shape, colour and kind off one image, uint8 [H, W, 3]."""
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected one image, uint8 [H, W, 3]; found {image.dtype} {list(image.shape)}")
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    ground = np.median(border, axis=0).astype(np.float32)
    distance = ground_distance(image, ground)
    mask = distance > GROUND_DISTANCE
    if not mask.any():
        return Reading(ground, mask, None, None)
    color = COLORS[int(color_distances(np.median(image[mask], axis=0)).argmin())]
    # A blob that fades towards its rim, or a pale one, has no outline to speak of.
    contrast = np.linalg.norm(np.float32(PALETTE[color]) - ground)
    crisp = np.count_nonzero(distance > 0.5 * max(contrast, distance.max())) >= 0.5 * np.count_nonzero(mask)
    return Reading(ground, mask, color, outline_kind(mask) if crisp else None)


def ground_distance(image: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """RGB distance of each pixel to a ground colour [3], float32 [H, W]."""
    difference = image - ground
    return np.sqrt(np.einsum("hwc,hwc->hw", difference, difference))


def color_distances(rgb: np.ndarray) -> np.ndarray:
    """RGB distance of each value to each palette colour, in the order of COLORS: [..., 3] -> [..., 8]."""
    return np.linalg.norm(rgb[..., None, :] - PALETTE_RGB, axis=-1)


def outline_kind(mask: np.ndarray) -> str | None:
    """The kind of shape that a non-empty mask outlines, from its bounding box; None where it is none of the three.

    How full the box and its four outer quarters are tells the kinds apart. Over the 5,000 images of easy-VQA the box
    is at least 0.98 full for a rectangle, 0.77 to 0.91 for a circle, 0.50 to 0.71 for a triangle, and a triangle's
    lowest quarter is at least 0.62 fuller than its highest. A circle has a square box with outer quarters that match
    pairwise, and it leaves the box's corners free, where a square with blurred corners does not.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape
    quarter_y, quarter_x = max(1, round(height / 4)), max(1, round(width / 4))
    fill = box.mean()
    top, bottom = box[:quarter_y].mean(), box[-quarter_y:].mean()
    left, right = box[:, :quarter_x].mean(), box[:, -quarter_x:].mean()
    if (fill >= 0.9 and min(top, bottom, left, right) >= 0.85) or is_ragged_rectangle(box):
        return "rectangle"
    if 0.42 <= fill <= 0.74 and bottom - top >= 0.5 and abs(left - right) <= 0.25:
        return "triangle"
    side = max(height, width)
    matched = abs(top - bottom) <= 0.25 and abs(left - right) <= 0.25 and abs(height - width) <= 0.2 * side
    if 0.7 <= fill <= 0.92 and matched and diagonal_fill(box) <= np.sqrt(0.5) + 1.5 / side:
        return "circle"
    return None


def is_ragged_rectangle(box: np.ndarray) -> bool:
    """Whether a bounding box is a rectangle once partly filled outermost lines, at most one a side, are left out.

    An edge between two pixels is half ground, half shape, and a grey level decides which of its pixels count. Small
    boxes are left alone: a circle of twelve pixels without its outermost lines is nearly full.
    """
    if min(box.shape) < 14:
        return False
    ragged = [int(line.mean() < 0.85) for line in (box[0], box[-1], box[:, 0], box[:, -1])]
    top, bottom, left, right = ragged
    box = box[top : len(box) - bottom, left : box.shape[1] - right]
    sides = (box[0], box[-1], box[:, 0], box[:, -1])
    return box.mean() >= 0.95 and min(side.mean() for side in sides) >= 0.8 and diagonal_fill(box) >= 0.95


def diagonal_fill(box: np.ndarray) -> float:
    """The filled part of the two diagonals of a bounding box: 1 for a rectangle, about sqrt(1/2) for a circle."""
    height, width = box.shape
    steps = (np.arange(max(height, width)) + 0.5) / max(height, width)
    y, x = (steps * height).astype(int), (steps * width).astype(int)
    return (box[y, x].mean() + box[y, width - 1 - x].mean()) / 2


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
