"""What an easy-VQA image shows, read from its pixels: its ground, and the outline, colour and kind of its shape.

One flat shape on a plain ground can be read off with a few distances and no network. Images are uint8 [H, W, 3]; a mask
is bool [H, W]; colours are in pixel values, 0 to 255.
"""

import dataclasses

import numpy as np

from npedit_jax.data.easyvqa import COLORS, PALETTE, Shape

GROUND_DISTANCE = 60  # RGB distance to the ground from which on a pixel belongs to the shape
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
    boxes that are about square are left alone: a circle of twelve pixels without its outermost lines is nearly full.
    """
    if min(box.shape) < 14 and max(box.shape) < 1.25 * min(box.shape):
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
