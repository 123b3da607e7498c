"""The embedded data set as a source of samples: edits are drawn for its images, and pictures redrawn."""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from npedit_jax.data import easyvqa, easyvqa_edits
from npedit_jax.data.sources import Example, Pool

# (image number, rng) -> image uint8 [H, W, 3] and what it shows
_Picture = Callable[[int, np.random.Generator], tuple[np.ndarray, easyvqa.Shape | None]]


class EasyVQASource:
    """Edits and pictures of easy-VQA images, of which there is one bucket; see `data.sources`.

    Attributes:
      data: the images.
    """

    edit_types = easyvqa.EDIT_TYPES

    def __init__(self, data: easyvqa.EasyVQA):
        self.data = data
        self.buckets = (data.images.shape[1:3],)

    def edits(self, shares: Mapping[str, float]) -> dict[str, Pool]:
        """Every image may get every edit, drawn when it is read."""
        return {name: self._pool(share, self._edit, name) for name, share in shares.items()}

    def captioned(self) -> dict[str, Pool]:
        """Every image with its own caption, and an instruction that it could get."""
        return {"all": self._pool(1.0, self._captioned, self._own)}

    def pictures(
        self, *, plain_share: float = 0.0, redraw: float = 0.0, flip: float = 0.0, instruction_share: float = 0.0
    ) -> dict[str, Pool]:
        """Images of one's own making beside those of the data, for the networks that come before the editor.

        Args:
          plain_share: share of images that are the bare ground, so that a model knows the empty picture.
          redraw: probability that an image's shape gives way to one drawn anew: any colour, class, place and size.
          flip: probability that an image is mirrored left to right.
          instruction_share: probability that an instruction which would lead to the image stands in for its caption. A
            text encoder that learns here alone would otherwise never meet the words of instructions. No other image is
            seen.
        """
        drawn = functools.partial(self._draw, redraw=redraw, flip=flip)
        read = functools.partial(self._instructed, instruction_share)
        return {
            "shape": self._pool(1.0 - plain_share, read, drawn),
            "plain": self._pool(plain_share, read, self._plain),
        }

    def _pool(self, weight: float, read: Callable[..., Example], what: str | _Picture) -> Pool:
        edit_type = what if isinstance(what, str) else ""
        return Pool(weight, (len(self.data),), functools.partial(read, what), edit_type)

    def _edit(self, edit_type: str, bucket: int, number: int, rng: np.random.Generator) -> Example:
        del bucket
        source = self.data.shapes[number]
        edit = easyvqa.draw_edit(rng, source, edit_type)
        caption = easyvqa.caption(edit.target, rng)
        example = (self.data.images[number], edit.instruction, caption, easyvqa.caption(source), edit.object)
        return Example(*example, f"easyvqa/{number}")

    def _captioned(self, draw: _Picture, bucket: int, number: int, rng: np.random.Generator) -> Example:
        del bucket
        image, shape = draw(number, rng)
        caption = easyvqa.caption(shape, rng)
        instruction = easyvqa.draw_edit(rng, shape, easyvqa.pick(self.edit_types, rng)).instruction
        return Example(image, instruction, "", caption, "", f"easyvqa/{number}")

    def _instructed(self, share: float, draw: _Picture, bucket: int, number: int, rng: np.random.Generator) -> Example:
        """An instruction in the place of a share of the captions."""
        del bucket
        image, shape = draw(number, rng)
        instructed = rng.random() < share
        words = easyvqa.instruction_towards(shape, rng) if instructed else easyvqa.caption(shape, rng)
        return Example(image, "", "", words, "", f"easyvqa/{number}")

    def _own(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, easyvqa.Shape]:
        del rng
        return self.data.images[number], self.data.shapes[number]

    def _plain(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
        """An image's bare ground."""
        del rng
        return np.broadcast_to(self.data.grounds[number], self.data.images[number].shape), None

    def _draw(
        self, number: int, rng: np.random.Generator, *, redraw: float, flip: float
    ) -> tuple[np.ndarray, easyvqa.Shape]:
        """An image of the data, or another shape on its ground."""
        image, shape = self.data.images[number], self.data.shapes[number]
        if rng.random() < redraw:
            shape = easyvqa.Shape(easyvqa.pick(easyvqa.COLORS, rng), easyvqa.pick(easyvqa.CLASSES, rng))
            image = _redraw(self.data.grounds[number], shape, image.shape[:2], rng)
        return (image[:, ::-1] if rng.random() < flip else image), shape


def _redraw(ground: np.ndarray, shape: easyvqa.Shape, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A shape of any size and place that the data can have, on a ground [3]."""
    # In half pixels, as the data's own shapes are placed: a circle stays as wide as it is high.
    sides = rng.integers(round(2 * easyvqa_edits.SMALLEST), round(2 * easyvqa_edits.LARGEST), size=2, endpoint=True)
    width, other = sides.tolist()
    triangle = round(width * easyvqa_edits.TRIANGLE_HEIGHT)
    height = {"circle": width, "rectangle": other, "triangle": triangle}[shape.kind]
    top, left = rng.integers(0, (2 * size[0] - height, 2 * size[1] - width), endpoint=True).tolist()
    box = (top / 2, left / 2, (top + height) / 2, (left + width) / 2)
    return easyvqa_edits.draw(shape.kind, shape.color, ground, box, size)
