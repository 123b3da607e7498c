"""Edits of easy-VQA images done by hand: an image is taken apart into ground, colour and coverage, and drawn anew.

easy-VQA draws its shapes unrotated at 128x128 and halves the picture with a bilinear filter, so an outline is one or
two pixels soft. `coverage` does the same: what is drawn here is as crisp as the data. A pixel is
`ground + coverage * (color - ground)`. Boxes are (top, left, bottom, right) in pixels, in steps of half a pixel;
images are uint8 [H, W, 3].
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from npedit_jax.data.easyvqa import EDIT_TYPES, PALETTE, Edit
from npedit_jax.data.easyvqa_reading import Reading, read

Box = tuple[float, float, float, float]

TRIANGLE_HEIGHT = 0.866  # of its width: easy-VQA's triangles are equilateral, point up
SMALLEST, LARGEST = 9.0, 33.0  # pixels: the sides of the data's circles and squares


@dataclasses.dataclass(frozen=True)
class Scene:
    """An easy-VQA image taken apart.

    Attributes:
        ground: float32 [3], RGB of the ground.
        rgb: float32 [3], RGB of the shape.
        alpha: float32 [H, W], the part of each pixel that the shape covers, 0 to 1.
        kind: "circle", "rectangle" or "triangle".
        box: the shape's bounding box.
    """

    ground: np.ndarray
    rgb: np.ndarray
    alpha: np.ndarray
    kind: str
    box: Box

    def render(self) -> np.ndarray:
        """The picture, uint8 [H, W, 3]."""
        return np.rint(self.ground + self.alpha[..., None] * (self.rgb - self.ground)).astype(np.uint8)

    def recolored(self, color: str) -> "Scene":
        """The same shape in another palette colour."""
        return dataclasses.replace(self, rgb=np.array(PALETTE[color], np.float32))

    def removed(self) -> "Scene":
        """The ground alone."""
        return dataclasses.replace(self, alpha=np.zeros_like(self.alpha))

    def drawn(self, kind: str, box: Box) -> "Scene":
        """A shape of this scene's colour, of any kind and box, in place of the old one."""
        return dataclasses.replace(self, kind=kind, box=box, alpha=coverage(kind, box, self.alpha.shape))

    def replaced(self, kind: str, aspect: float = 1.0) -> "Scene":
        """Another kind of shape in the old one's place; `aspect` is a rectangle's width over its height."""
        return self.drawn(kind, box_like(self.box, kind, self.alpha.shape, aspect=aspect))

    def of_kind(self, kind: str) -> "Scene":
        """The scene with that kind of shape: itself where it has it."""
        return self if kind == self.kind else self.replaced(kind)

    def moved(self, down: float, right: float) -> "Scene":
        """The shape at another place, stopped at the border."""
        y0, x0, y1, x1 = self.box
        return self.drawn(self.kind, fit((y0 + down, x0 + right, y1 + down, x1 + right), self.alpha.shape))

    def resized(self, scale: float) -> "Scene":
        """The shape grown or shrunk about its centre, stopped at the border."""
        top, left, bottom, right = self.box
        y, x, h, w = (top + bottom) / 2, (left + right) / 2, scale * (bottom - top) / 2, scale * (right - left) / 2
        return self.drawn(self.kind, fit((y - h, x - w, y + h, x + w), self.alpha.shape))


def take_apart(image: np.ndarray, reading: Reading | None = None) -> Scene:
    """Takes an easy-VQA image apart; `render` of the result gives it back to within 2 of 255.

    Raises:
        ValueError: where the image does not show one shape of a palette colour.
    """
    reading = reading or read(image)
    if reading.shape is None:
        raise ValueError(f"expected one easy-VQA shape; read the colour {reading.color} and the kind {reading.kind}")
    rgb = np.array(PALETTE[reading.color], np.float32)
    ink = rgb - reading.ground
    alpha = np.clip((image - reading.ground) @ ink / (ink @ ink), 0.0, 1.0)
    top, left, bottom, right = bounding_box(alpha)
    if reading.kind == "triangle":  # its corners are too thin to show in full
        top, left, right = max(0.0, top - 0.5), max(0.0, left - 0.5), min(image.shape[1], right + 0.5)
    return Scene(reading.ground, rgb, alpha, reading.kind, (top, left, bottom, right))


def apply(image: np.ndarray, edit: Edit) -> np.ndarray:
    """Carries one edit out by hand."""
    match edit.edit_type:
        case "recolor":
            return recolor(image, edit.target.color)
        case "remove":
            return remove(image)
        case "replace":
            return replace(image, edit.target.kind)
        case "nothing":
            return image.copy()
        case other:
            raise ValueError(f"expected one of the edit types {EDIT_TYPES}; found {other!r}")


def recolor(image: np.ndarray, color: str) -> np.ndarray:
    """The image with its shape in another palette colour."""
    return take_apart(image).recolored(color).render()


def remove(image: np.ndarray) -> np.ndarray:
    """The image without its shape."""
    return take_apart(image).removed().render()


def replace(image: np.ndarray, kind: str) -> np.ndarray:
    """The image with another kind of shape of the same colour, centre and size."""
    return take_apart(image).replaced(kind).render()


def draw(kind: str, color: str, ground: np.ndarray, box: Box, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """An image of its own: one shape on a ground of any colour, RGB 0 to 255."""
    rgb = np.array(PALETTE[color], np.float32)
    return Scene(np.asarray(ground, np.float32), rgb, coverage(kind, box, size), kind, box).render()


def bounding_box(alpha: np.ndarray) -> Box:
    """Box of a shape from its coverage: a border row or column that is covered in part counts by that part."""

    def ends(profile: np.ndarray) -> tuple[float, float]:
        full = np.flatnonzero(profile > 0.75)
        first, last = full[0], full[-1] + 1
        return round(2 * (first - profile[:first].sum())) / 2, round(2 * (last + profile[last:].sum())) / 2

    (top, bottom), (left, right) = ends(alpha.max(1)), ends(alpha.max(0))
    return top, left, bottom, right


def box_like(box: Box, kind: str, size: tuple[int, int], aspect: float = 1.0, scale: float = 1.0) -> Box:
    """A box for a shape of `kind` with the centre and about the size of an old box.

    Args:
        box: the old box.
        kind: "circle", "rectangle" or "triangle".
        size: (height, width) of the image, in which the box stays.
        aspect: a rectangle's width over its height.
        scale: the new shape's size, as a factor on the old one's; the result is kept to the data's sizes.
    """
    top, left, bottom, right = box
    side = np.clip(scale * np.sqrt((bottom - top) * (right - left)), SMALLEST, LARGEST)
    height, width = {
        "circle": (side, side),
        "rectangle": (side / np.sqrt(aspect), side * np.sqrt(aspect)),
        "triangle": (side * TRIANGLE_HEIGHT, side),
    }[kind]
    y, x = (top + bottom) / 2, (left + right) / 2
    return fit((y - height / 2, x - width / 2, y + height / 2, x + width / 2), size)


def fit(box: Box, size: tuple[int, int]) -> Box:
    """Moves a box into an image of (height, width) `size`, cutting it only where it is larger than the image."""
    (top, left, bottom, right), (height, width) = box, size
    down = max(0.0, -top) - max(0.0, bottom - height)
    aside = max(0.0, -left) - max(0.0, right - width)
    return max(0.0, top + down), max(0.0, left + aside), min(height, bottom + down), min(width, right + aside)


def coverage(kind: str, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The part of each pixel that a shape covers, float32 [H, W] for (height, width) `size`, as easy-VQA draws it."""
    height, width = size
    top, left, bottom, right = (round(2 * edge) for edge in box)
    canvas = Image.new("L", (2 * width, 2 * height))
    pen = ImageDraw.Draw(canvas)
    match kind:
        case "circle":
            pen.ellipse((left, top, right - 1, bottom - 1), fill=255)
        case "rectangle":
            pen.rectangle((left, top, right - 1, bottom - 1), fill=255)
        case "triangle":
            pen.polygon([((left + right - 1) / 2, top), (left, bottom - 1), (right - 1, bottom - 1)], fill=255)
        case _:
            raise ValueError(f'expected a kind of "circle", "rectangle", "triangle"; found "{kind}"')
    return np.asarray(canvas.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
