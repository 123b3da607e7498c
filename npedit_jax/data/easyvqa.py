"""The embedded data set: easy-VQA's images of one coloured shape each, and the captions and edits that go with them.

The PyPI package `easy-vqa` ships 4,000 train and 1,000 test images of 64 x 64 pixels and 48,248 questions about them.
What an image shows is derived from the package's own questions and answers.
"""

import collections
import dataclasses
import functools
import io
import itertools
from collections.abc import Iterator, Sequence

import easy_vqa
import numpy as np
from etils import epath
from PIL import Image

from npedit_jax.data import edit_types

CLASSES = ("circle", "rectangle", "triangle")
# The package draws with these named colours; RGB, 0 to 255.
PALETTE = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
COLORS = tuple(PALETTE)
EDIT_TYPES = ("recolor", "remove", "replace", "nothing")

# The first of each is the canonical wording, used where no rng is given.
_SHAPE_CAPTIONS = (
    "a {color} {kind} on a plain background",
    "a {color} {kind}",
    "a plain background with a {color} {kind}",
)
_GROUND_CAPTION = "a plain background"
_NOUNS = ("the {kind}", "the {color} {kind}", "the shape")
_INSTRUCTIONS = {
    "recolor": ("make {noun} {new}", "change the color of {noun} to {new}", "paint {noun} {new}"),
    "remove": ("remove {noun}", "delete {noun}", "take {noun} away"),
    "replace": ("replace {noun} with a {new}", "turn {noun} into a {new}", "change {noun} to a {new}"),
    "nothing": edit_types.DO_NOTHING,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an image shows on its plain ground: a colour of PALETTE and a kind of CLASSES."""

    color: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Edit:
    """An edit of an image that shows `source`; `target` is what is to be seen afterwards, None for the bare ground."""

    edit_type: str
    instruction: str
    source: Shape
    target: Shape | None

    @property
    def object(self) -> str:
        """The noun by which questions name what is edited."""
        return self.source.kind


@dataclasses.dataclass(frozen=True)
class EasyVQA:
    """One split of the data set, ordered by the package's image ids.

    Attributes:
      images: uint8 [n, 64, 64, 3].
      grounds: uint8 [n, 3], each image's ground colour: the median of its border.
      shapes: what each image shows.
      answered: bool [n, 2], whether (colour, kind) follows from the package's answers, else from the pixels.
      questions: each image's questions with their answers: "yes", "no", a colour or a class.
    """

    images: np.ndarray
    grounds: np.ndarray
    shapes: tuple[Shape, ...]
    answered: np.ndarray
    questions: tuple[tuple[tuple[str, str], ...], ...]

    def __len__(self) -> int:
        return len(self.shapes)

    def fraction(self, share: float) -> "EasyVQA":
        """The first images, a share of all in (0, 1]; at least one."""
        if not 0 < share <= 1:
            raise ValueError(f"expected a share of the images with 0 < share <= 1; found {share}")
        count = max(1, round(share * len(self)))
        return EasyVQA(*(getattr(self, field.name)[:count] for field in dataclasses.fields(self)))


@functools.cache
def load(split: str) -> EasyVQA:
    """Reads the "train" (4,000 images) or "test" (1,000 images) split, once in a process: its arrays are read-only.

    Raises:
      ValueError: unknown split, or questions of the package that contradict each other or the pixels.
    """
    if split not in ("train", "test"):
        raise ValueError(f'expected the split "train" or "test"; found {split!r}')
    read_questions = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    paths = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()
    if sorted(paths) != list(range(len(paths))):
        raise ValueError(f"expected easy-vqa's {split} images to be numbered from 0; found {len(paths)} with gaps")
    images = np.stack([_decode(paths[image_id]) for image_id in range(len(paths))])
    grounds = np.stack([_ground(image) for image in images])

    asked = collections.defaultdict(list)
    for text, answer, image_id in zip(*read_questions(), strict=True):
        asked[image_id].append((text, answer))
    facts = [_facts(asked[image_id]) for image_id in range(len(images))]
    shapes = tuple(_shape(*item) for item in zip(facts, images, grounds, strict=True))
    questions = tuple(tuple(asked[image_id]) for image_id in range(len(images)))
    answered = np.array([[len(colors) == 1, len(kinds) == 1] for colors, kinds in facts])
    for array in (images, grounds, answered):
        array.setflags(write=False)
    return EasyVQA(images, grounds, shapes, answered, questions)


def caption(shape: Shape | None, rng: np.random.Generator | None = None) -> str:
    """A caption of an image that shows `shape`, or of the bare ground; the canonical one without an rng."""
    if shape is None:
        return _GROUND_CAPTION
    return pick(_SHAPE_CAPTIONS, rng).format(color=shape.color, kind=shape.kind)


def instruction(rng: np.random.Generator | None, edit_type: str, source: Shape, target: Shape | None) -> str:
    """One of the instruction's paraphrases; the canonical one without an rng.

    Raises:
      ValueError: unknown edit type, or a target that the edit type cannot lead to.
    """
    if edit_type not in EDIT_TYPES:
        raise ValueError(f"unknown edit type {edit_type!r}; choose one of {EDIT_TYPES}")
    expected = {
        "recolor": target and target.kind == source.kind and target.color != source.color,
        "remove": target is None,
        "replace": target and target.kind != source.kind and target.color == source.color,
        "nothing": target == source,
    }
    if not expected[edit_type]:
        raise ValueError(f"edit type {edit_type!r} does not lead from {source} to {target}")
    new = {"recolor": target and target.color, "replace": target and target.kind}.get(edit_type)
    noun = pick(_NOUNS, rng).format(color=source.color, kind=source.kind)
    return pick(_INSTRUCTIONS[edit_type], rng).format(noun=noun, new=new)


def draw_edit(rng: np.random.Generator, source: Shape, edit_type: str) -> Edit:
    """Draws the new colour or class, different from the old one, and the wording of the instruction."""
    if edit_type == "recolor":
        target = Shape(pick([color for color in COLORS if color != source.color], rng), source.kind)
    elif edit_type == "replace":
        target = Shape(source.color, pick([kind for kind in CLASSES if kind != source.kind], rng))
    else:
        target = None if edit_type == "remove" else source
    return Edit(edit_type, instruction(rng, edit_type, source, target), source, target)


def instruction_towards(target: Shape | None, rng: np.random.Generator) -> str:
    """An instruction that would lead to an image of `target` (None: the bare ground) from one of another shape."""
    others = {
        "recolor": lambda: Shape(pick([color for color in COLORS if color != target.color], rng), target.kind),
        "replace": lambda: Shape(target.color, pick([kind for kind in CLASSES if kind != target.kind], rng)),
        "remove": lambda: Shape(pick(COLORS, rng), pick(CLASSES, rng)),
        "nothing": lambda: target,
    }
    edit_type = "remove" if target is None else pick(("recolor", "recolor", "replace", "replace", "nothing"), rng)
    return instruction(rng, edit_type, others[edit_type](), target)


def texts() -> Iterator[str]:
    """Every caption and every instruction that can be drawn, some more than once: what a vocabulary must cover."""
    yield _GROUND_CAPTION
    shapes = [Shape(*pair) for pair in itertools.product(COLORS, CLASSES)]
    for shape in shapes:
        for wording in _SHAPE_CAPTIONS:
            yield wording.format(color=shape.color, kind=shape.kind)
    for edit_type, noun, shape in itertools.product(EDIT_TYPES, _NOUNS, shapes):
        for wording in _INSTRUCTIONS[edit_type]:
            for new in {"recolor": COLORS, "replace": CLASSES}.get(edit_type, ("",)):
                yield wording.format(noun=noun.format(color=shape.color, kind=shape.kind), new=new)


def pick(options: Sequence[str], rng: np.random.Generator | None = None) -> str:
    """One of the options, all alike; the first without an rng."""
    return options[0 if rng is None else int(rng.integers(len(options)))]


def _decode(path: str) -> np.ndarray:
    with Image.open(io.BytesIO(epath.Path(path).read_bytes()), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def _ground(image: np.ndarray) -> np.ndarray:
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    return np.median(border, axis=0).astype(np.uint8)


def _facts(asked: list[tuple[str, str]]) -> tuple[set[str], set[str]]:
    """The colours and the classes that the answers about one image leave possible."""
    possible = {"color": set(COLORS), "kind": set(CLASSES)}
    for text, answer in asked:
        words = text.rstrip("?").split()
        # Of "does the image not contain a circle?" and "is no circle present?", yes says that there is none.
        negated = "not" in words or "no" in words
        excluded = answer in ("yes", "no") and (answer == "no") != negated
        for options in possible.values():
            named = options & {*words, answer}
            if named:
                options.intersection_update(options - named if excluded else named)
    if not all(possible.values()):
        raise ValueError(f"easy-vqa's answers about one image contradict each other: {asked}")
    return possible["color"], possible["kind"]


def _shape(facts: tuple[set[str], set[str]], image: np.ndarray, ground: np.ndarray) -> Shape:
    """The shape that the answers name; a colour or class that they leave open is read from the pixels."""
    colors, kinds = facts
    if len(colors) == 1 and len(kinds) == 1:
        return Shape(*colors, *kinds)
    distance = np.linalg.norm(image.astype(np.float32) - ground, axis=-1)
    rows, columns = np.nonzero(distance > 60)
    color_distance = np.linalg.norm(np.array(list(PALETTE.values())) - np.median(image[rows, columns], axis=0), axis=-1)
    fill = len(rows) / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    # Over all images whose class is known: triangles fill .51 to .70 of their bounding box, circles .78 to .90,
    # rectangles .98 and more.
    kind = "triangle" if fill < 0.74 else "circle" if fill < 0.94 else "rectangle"
    shape = Shape(COLORS[int(color_distance.argmin())], kind)
    if shape.color not in colors or shape.kind not in kinds:
        raise ValueError(f"the pixels show {shape}, but easy-vqa's answers leave only {colors} and {kinds}")
    return shape
