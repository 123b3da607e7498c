"""What the small scorer of the easy-VQA experiment learns from: image pairs made by pixel operations, and answers.

It plays the pretrained vision-language model, so it may see pairs. Its gradient has to mean something off the data:
everywhere on the way from the unedited copy to the finished edit, and on pictures as an unfinished editor makes them.
So answers are probabilities of Yes that rise smoothly with how much of an edit is there and fall smoothly with how much
else has changed; and noise, blur and grids lie on good and bad candidates alike, so that they alone decide nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from npedit_jax.data import easyvqa, easyvqa_edits
from npedit_jax.data import questions as questions_lib
from npedit_jax.data.easyvqa import Edit, Shape, pick
from npedit_jax.data.easyvqa_edits import Scene

EDIT_SHARES = {"recolor": 0.3, "remove": 0.25, "replace": 0.35, "nothing": 0.1}
CANDIDATE_SHARES = {
    "whole": 0.16,
    "copy": 0.09,
    "fade": 0.17,
    "morph": 0.15,
    "warp": 0.2,
    "part": 0.06,
    "wrong": 0.13,
    "soft": 0.04,
}
# Examples by what they ask: the package's questions, how even a new outline is, or the editor's questions. Outlines are
# the last thing to be seen: their answers stay at the mean until some ten thousand examples have shown nothing else.
SHARES = {"vqa": 0.15, "outline": 0.4, "edit": 0.45}
OUTLINE_SHARES = {"whole": 0.35, "warp": 0.45, "morph": 0.2}
UNRELATED_SHARE = 0.1  # candidates that show another image: from them comparing is learned first
IDENTITY_WEIGHT = 2.0  # comparing images is the hardest of all that is asked
SIDE_EFFECT_SHARE = 0.5
REMOVAL_SHOWN_ALONE = 0.6  # of the removals, the rest shows both images
SURE = 0.98  # no answer is certain
# How uneven a new outline is, in pixels, where Yes and No are as likely. As likely as not to be read as none of the
# classes it is at 1.3, 0.6 and 1.3: an editor that learns from the answers has to be led further than that.
UNEVEN = {"circle": 0.8, "rectangle": 0.4, "triangle": 0.8}
# The same of a circle's longer side over its shorter (read as none from 1.25 on), and of the part of a rectangle's
# shorter half side that corners are rounded by (from about 0.6 on where both corners of a side are).
STRETCHED, ROUNDED = 1.12, 0.35
BLUNT = 0.75  # share of the way to a new outline up to which it is rather none of the classes
# Mean absolute change outside the edit, 0 to 255: below the first all is the same, above the second it is not.
SAME, CHANGED = 2.0, 9.0


class Asked(NamedTuple):
    """A question of some kind of template, and the probability that it is answered with `word` and not with No."""

    kind: str
    text: str
    answer: float
    word: str = "Yes"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class ScorerExample:
    """Two images [H, W, 3] uint8, and questions about them.

    All questions show the same images, so that a packed row holds those once. `edit_type` is that of the edit between
    them; "" where there is none.
    """

    images: tuple[np.ndarray, np.ndarray]
    questions: tuple[Asked, ...]
    edit_type: str = ""


@dataclasses.dataclass
class Candidate:
    """What an editor might have made: float32 [H, W, 3] in 0 to 255, how much of the edit is there, what of it shows.

    `done` in [0, 1] is the share of the edit; `object_left` in [0, 1] how much of the old object is still to be seen;
    `same` in [0, 1] how far the rest is unchanged; `shape` what is to be seen where that is one clear shape.
    """

    pixels: np.ndarray
    done: float
    object_left: float
    same: float = 1.0
    shape: Shape | None = None


class PairSource:
    """Draws examples: `source(image number, rng)`; a pure function of both."""

    def __init__(self, data: easyvqa.EasyVQA, templates: questions_lib.Templates, questions: int = 3):
        """`questions` is the most that an example comes with, at least 2."""
        self._data, self._templates, self._questions = data, templates, questions
        self._scenes: dict[int, Scene] = {}

    def __call__(self, index: int, rng: np.random.Generator) -> ScorerExample:
        """An example about one image of the data."""
        make = {"vqa": self._vqa, "outline": self._outline, "edit": self._edit}
        return make[choose(SHARES, rng)](index, rng)

    def scene(self, index: int) -> Scene:
        """The image taken apart."""
        if index not in self._scenes:
            self._scenes[index] = easyvqa_edits.take_apart(self._data.images[index])
        return self._scenes[index]

    def _vqa(self, index: int, rng: np.random.Generator) -> ScorerExample:
        """The package's own questions, about the image as it is or a little spoiled."""
        image, asked = self._data.images[index], list(self._data.questions[index])
        rng.shuffle(asked)
        asked.sort(key=lambda question: question[1] in ("yes", "no"))  # those that want another word first
        spoiled = to_uint8(spoil(np.float32(image), rng))
        return ScorerExample((image, spoiled), tuple(self._ask(*item) for item in asked[: self._questions]))

    def _ask(self, question: str, answer: str) -> Asked:
        """A question of the package. Words as answers teach colours and classes long before yes and no would."""
        text = questions_lib.ask(self._templates, "vqa", question=question).text
        if answer in ("yes", "no"):
            return Asked("vqa", text, sure(float(answer == "yes")))
        return Asked("vqa", text, SURE, answer)

    def _outline(self, index: int, rng: np.random.Generator) -> ScorerExample:
        """Whether a new outline is that of its class, and of which class the shape is where that is clear."""
        reference = self._data.images[index]
        edit = easyvqa.draw_edit(rng, self._data.shapes[index], "replace")
        made = candidate(self.scene(index), edit, rng, OUTLINE_SHARES)
        answers = [self._answer("edit", edit, made.done)]
        for kind in easyvqa.CLASSES:
            if kind == edit.target.kind or made.shape is not None:
                text = self._templates["look"].text.format(question=f"is there a {kind} in image-2?")
                answers.append(Asked("look", text, sure(made.done if kind == edit.target.kind else 0.0)))
        pixels = to_uint8(spoil(made.pixels, rng))
        return ScorerExample((reference, pixels), tuple(answers[: self._questions]), edit.edit_type)

    def _edit(self, index: int, rng: np.random.Generator) -> ScorerExample:
        """The questions that the editor will be asked, about a candidate of any quality.

        The candidate is asked about for other edits too: only the instruction then tells the answers apart.
        """
        reference, scene, source = self._data.images[index], self.scene(index), self._data.shapes[index]
        edit = easyvqa.draw_edit(rng, source, choose(EDIT_SHARES, rng))
        if rng.random() < UNRELATED_SHARE:
            made = self._unrelated(rng)
        else:
            made = candidate(scene, edit, rng)
        if rng.random() < SIDE_EFFECT_SHARE:
            made = side_effect(made, scene, rng)
        pixels = to_uint8(spoil(made.pixels, rng))
        if edit.edit_type == "remove" and rng.random() < REMOVAL_SHOWN_ALONE:
            # Any shape that is left is one too many, whatever the question calls it.
            objects = (edit.object, pick(easyvqa.CLASSES, rng))
            answers = [self._answer("edit_remove", edit, made.object_left, object=name) for name in objects]
        else:
            answers = self._both_images(edit, made, rng)
        return ScorerExample((reference, pixels), tuple(answers[: self._questions]), edit.edit_type)

    def _unrelated(self, rng: np.random.Generator) -> Candidate:
        """Any other image of the data."""
        index = int(rng.integers(len(self._data)))
        return Candidate(np.float32(self._data.images[index]), 0.0, 1.0, 0.0, self._data.shapes[index])

    def _both_images(self, edit: Edit, made: Candidate, rng: np.random.Generator) -> list[Asked]:
        """Questions about both images, those of the edit first."""
        if edit.edit_type == "remove":
            answers = [self._answer("identity_remove", edit, made.same)]
        else:
            answers = [self._answer("edit", edit, made.done), self._answer("identity", edit, made.same)]
        answers += self._look(edit.source, made.shape, rng)
        for number in range(self._questions - len(answers)):
            alike = edit.edit_type in ("recolor", "replace") and number % 2 == 0
            edit_type = edit.edit_type if alike else pick(("recolor", "replace"), rng)
            other = easyvqa.draw_edit(rng, edit.source, edit_type)
            if (done := carried_out(other, edit, made)) is not None:
                answers.append(self._answer("edit", other, done))
        return answers

    def _look(self, first: Shape, second: Shape | None, rng: np.random.Generator) -> list[Asked]:
        """What is to be seen in one of the two images, the second one where that is clear."""
        number, shape = (2, second) if second and rng.random() < 0.7 else (1, first)
        asked = [(f"what color is the shape in image-{number}?", shape.color)]
        asked += [(f"what shape is in image-{number}?", shape.kind)]
        return [Asked("look", self._templates["look"].text.format(question=text), SURE, word) for text, word in asked]

    def _answer(self, kind: str, edit: Edit, answer: float, object: str = "") -> Asked:
        fields = dict(instruction=edit.instruction, object=object or edit.object)
        weight = IDENTITY_WEIGHT if kind.startswith("identity") else 1.0
        return Asked(kind, questions_lib.ask(self._templates, kind, **fields).text, sure(answer), weight=weight)


def carried_out(other: Edit, edit: Edit, made: Candidate) -> float | None:
    """How much of another edit is there in what was made of `edit`; None where that cannot be said."""
    if other.target == edit.target:
        return made.done
    if made.shape == other.target:
        return 1.0 if made.same > 0.5 else None
    if made.shape is not None:
        return 0.0
    # On the way to one colour lies no other class, and the other way round.
    return 0.0 if edit.edit_type not in (other.edit_type, "nothing") else None


def candidate(
    scene: Scene, edit: Edit, rng: np.random.Generator, shares: Mapping[str, float] = CANDIDATE_SHARES
) -> Candidate:
    """What an editor might make of the scene when told to carry the edit out; `shares`: of the kinds of candidates."""
    before = np.float32(scene.render())
    goal_scene = goal(scene, edit, rng)
    after = np.float32(goal_scene.render())
    kind = choose(shares, rng)
    if edit.edit_type == "nothing":
        if kind in ("fade", "wrong"):
            return wrong_nothing(scene, edit, rng)
        return Candidate(before, 1.0, 1.0, shape=edit.source)
    if kind == "copy":
        return Candidate(before, 0.0, 1.0, shape=edit.source)
    if kind == "wrong":
        return wrong(scene, edit, rng)
    if kind == "fade":
        share = rng.random()
        return Candidate(before + share * (after - before), rises(share), 1.0 - rises(share))
    if kind == "part":
        share, mask = part(scene, goal_scene, rng)
        pixels = np.where(mask[..., None], after, before)
        return Candidate(pixels, rises(share), 1.0 - rises(share))
    if kind == "soft" and edit.edit_type != "remove":
        # A new outline has to be crisp; a recoloured shape may be soft for longer.
        sigma = rng.uniform(0.3, 3.5)
        crisp = falls(sigma, 0.6, 1.8) if edit.edit_type == "replace" else falls(sigma, 1.5, 3.5)
        return Candidate(blur(after, sigma), crisp, 0.0, 0.5 + 0.5 * crisp)
    if kind == "warp" and edit.edit_type != "remove":
        return warped(goal_scene, edit, float(np.exp(rng.uniform(np.log(0.2), np.log(4.0)))), rng)
    if kind == "misshaped" and edit.edit_type == "replace" and edit.target.kind != "triangle":
        return stretched(goal_scene, edit, rng) if edit.target.kind == "circle" else rounded(goal_scene, edit, rng)
    if kind == "morph" and edit.edit_type == "replace":
        # Blunt outlines are what an editor makes first: on the way from the old class, or from the third one.
        others = [kind for kind in easyvqa.CLASSES if kind != edit.target.kind]
        share, start = rng.random(), scene.of_kind(pick(others, rng))
        return Candidate(np.float32(morph(start, goal_scene, share).render()), rises(share, BLUNT), 0.0)
    return Candidate(after, 1.0, 0.0, shape=edit.target)


def goal(scene: Scene, edit: Edit, rng: np.random.Generator) -> Scene:
    """The finished edit; a new shape may be a little larger or smaller than the old one, a rectangle any way long."""
    match edit.edit_type:
        case "recolor":
            return scene.recolored(edit.target.color)
        case "remove":
            return scene.removed()
        case "replace":
            replaced = scene.replaced(edit.target.kind, aspect=float(np.exp(rng.uniform(-0.4, 0.4))))
            return replaced.resized(float(rng.uniform(0.9, 1.15))) if rng.random() < 0.5 else replaced
        case _:
            return scene


def morph(scene: Scene, goal_scene: Scene, share: float) -> Scene:
    """An outline on the way from one shape to the other, as crisp as they are; on the way its corners are blunt."""
    height = (1.0 - share) * inside(scene.alpha) + share * inside(goal_scene.alpha)
    return dataclasses.replace(goal_scene, alpha=np.float32(np.clip(height + 0.5, 0.0, 1.0)))


def inside(alpha: np.ndarray) -> np.ndarray:
    """How far each pixel lies inside the outline, in pixels; negative outside."""
    shape = alpha >= 0.5
    edge = np.where((alpha > 0.0) & (alpha < 1.0), alpha - 0.5, 0.0)
    far = ndimage.distance_transform_edt(shape) - ndimage.distance_transform_edt(~shape)
    return far - 0.5 * np.sign(far) + edge


def warped(goal_scene: Scene, edit: Edit, amplitude: float, rng: np.random.Generator) -> Candidate:
    """The finished edit with an uneven outline: how a new shape has to look is stricter than how an old one may."""
    made = uneven(goal_scene, amplitude, rng)
    if edit.edit_type == "replace":
        return outlined(made, edit, amplitude / UNEVEN[edit.target.kind])
    both, either = np.minimum(made.alpha, goal_scene.alpha), np.maximum(made.alpha, goal_scene.alpha)
    missing = 1.0 - float(both.sum() / either.sum())
    same = falls(missing, 0.1, 0.4)
    done = same if edit.edit_type == "nothing" else falls(missing, 0.2, 0.6)
    return Candidate(np.float32(made.render()), done, 0.0, same, edit.target if missing < 0.2 else None)


def outlined(made: Scene, edit: Edit, fault: float) -> Candidate:
    """A new outline with a fault, of which 1 is where Yes and No are as likely."""
    done = 1.0 / (1.0 + fault**3)
    return Candidate(np.float32(made.render()), done, 0.0, shape=edit.target if done > BLUNT else None)


def stretched(goal_scene: Scene, edit: Edit, rng: np.random.Generator) -> Candidate:
    """A new circle with the proportions of what it replaces: an ellipse, as an editor makes of a long rectangle."""
    top, left, bottom, right = goal_scene.box
    longer = float(np.exp(rng.uniform(0.0, np.log(2.0))))
    tall, wide = (longer**0.5, longer**-0.5)[:: 1 if rng.random() < 0.5 else -1]
    y, x, h, w = (top + bottom) / 2, (left + right) / 2, tall * (bottom - top) / 2, wide * (right - left) / 2
    made = goal_scene.drawn("circle", easyvqa_edits.fit((y - h, x - w, y + h, x + w), goal_scene.alpha.shape))
    return outlined(made, edit, (longer - 1.0) / (STRETCHED - 1.0))


def rounded(goal_scene: Scene, edit: Edit, rng: np.random.Generator) -> Candidate:
    """A new rectangle with some of its corners round, those of a side as often as any others."""
    top, left, bottom, right = goal_scene.box
    part = float(rng.uniform(0.05, 1.0))
    radius = part * min(bottom - top, right - left) / 2
    sides = ((1, 1, 0, 0), (0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0))  # corners clockwise from the top left
    corners = pick(sides, rng) if rng.random() < 0.5 else tuple(rng.random(4) < 0.6)
    y, x = (np.mgrid[: goal_scene.alpha.shape[0], : goal_scene.alpha.shape[1]] + 0.5).astype(np.float32)
    places = ((top, left, 1, 1), (top, right, 1, -1), (bottom, right, -1, -1), (bottom, left, -1, 1))
    alpha = goal_scene.alpha.copy()
    for is_round, (corner_y, corner_x, down, aside) in zip(corners, places, strict=True):
        below, beside = down * (y - corner_y) - radius, aside * (x - corner_x) - radius
        inner = np.clip(radius - np.hypot(below, beside) + 0.5, 0.0, 1.0)
        alpha = np.where(is_round & (below < 0) & (beside < 0), np.minimum(alpha, inner), alpha)
    made = dataclasses.replace(goal_scene, alpha=np.float32(alpha))
    return outlined(made, edit, part / ROUNDED if any(corners) else 0.0)


def uneven(scene: Scene, amplitude: float, rng: np.random.Generator) -> Scene:
    """The shape's outline pushed in and out by a smooth random field, `amplitude` pixels in the root mean square."""
    height, coarse = inside(scene.alpha), rng.normal(size=[int(rng.integers(4, 11))] * 2).astype(np.float32)
    field = np.asarray(Image.fromarray(coarse).resize(height.shape[::-1], Image.Resampling.BICUBIC))
    field = field / np.sqrt(np.mean(field[np.abs(height) < 2.0] ** 2))
    return dataclasses.replace(scene, alpha=np.float32(np.clip(height + amplitude * field + 0.5, 0.0, 1.0)))


def wrong_nothing(scene: Scene, edit: Edit, rng: np.random.Generator) -> Candidate:
    """An edit where none was asked for."""
    other = easyvqa.draw_edit(rng, edit.source, choose({"recolor": 1.0, "replace": 1.0, "remove": 1.0}, rng))
    before, after = np.float32(scene.render()), np.float32(goal(scene, other, rng).render())
    share = rng.random()
    return Candidate(before + share * (after - before), falls(share, 0.05, 0.6), 1.0, falls(share, 0.05, 0.6))


def wrong(scene: Scene, edit: Edit, rng: np.random.Generator) -> Candidate:
    """Another edit than the one asked for, or the right one to another degree."""
    colors = [color for color in easyvqa.COLORS if color not in (edit.source.color, getattr(edit.target, "color", ""))]
    kinds = [kind for kind in easyvqa.CLASSES if kind not in (edit.source.kind, getattr(edit.target, "kind", ""))]
    choice, source, target = rng.random(), edit.source, edit.target
    if edit.edit_type == "recolor":
        if choice < 0.6:
            return showing(scene, Shape(pick(colors, rng), source.kind), 0.0, 1.0)
        if choice < 0.8:
            return showing(scene, Shape(target.color, pick(kinds, rng)), 0.3, 0.0, 0.1)
        return Candidate(np.float32(scene.removed().render()), 0.0, 0.0, 0.1)
    if edit.edit_type == "remove":
        if choice < 0.4:  # another colour is still the object
            return showing(scene, Shape(pick(colors, rng), source.kind), 0.0, 1.0, 0.6)
        if choice < 0.7:  # another shape in its place
            return showing(scene, Shape(source.color, pick(kinds, rng)), 0.0, 1.0, 0.05)
        scale = rng.uniform(0.3, 0.8)
        return Candidate(np.float32(scene.resized(float(scale)).render()), 0.0, 1.0, shape=source)
    if choice < 0.35 and kinds:
        return showing(scene, Shape(source.color, pick(kinds, rng)), 0.0, 0.0)
    if choice < 0.5:
        return showing(scene, Shape(pick(colors, rng), target.kind), 0.2, 0.0, 0.1)
    if choice < 0.7:  # the right shape at another place
        down, right = rng.choice((-1, 1), 2) * rng.uniform(12, 30, 2)
        return Candidate(np.float32(scene.replaced(target.kind).moved(down, right).render()), 0.1, 0.0, 0.2)
    if choice < 0.85:
        both = np.maximum(scene.alpha, scene.replaced(target.kind).moved(*rng.uniform(-20, 20, 2)).alpha)
        return Candidate(np.float32(dataclasses.replace(scene, alpha=both).render()), 0.1, 1.0, 0.1)
    return Candidate(np.float32(scene.removed().render()), 0.0, 0.0, 0.5)


def showing(scene: Scene, shape: Shape, done: float, object_left: float, same: float = 1.0) -> Candidate:
    """A candidate that clearly shows this shape in the old one's place."""
    drawn = scene.of_kind(shape.kind).recolored(shape.color)
    return Candidate(np.float32(drawn.render()), done, object_left, same, shape)


def part(scene: Scene, goal_scene: Scene, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """A region of the image where the edit is done: a half plane or blots; and its share of what has to change."""
    height, width = scene.alpha.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        field = np.cos(angle) * x + np.sin(angle) * y
    else:
        coarse = rng.normal(size=(8, 8)).astype(np.float32)
        field = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    changing = np.abs(goal_scene.render().astype(np.float32) - scene.render()).sum(-1)
    weights = np.where(changing > 15, 1.0, 0.0)
    values = field[weights > 0]
    if not values.size:
        return 0.0, np.zeros_like(field, bool)
    mask = field <= np.quantile(values, rng.random())
    return float((mask * weights).sum() / weights.sum()), mask


def side_effect(made: Candidate, scene: Scene, rng: np.random.Generator) -> Candidate:
    """The candidate with something else changed as well, by any amount."""
    height, width = scene.alpha.shape
    pixels, choice = made.pixels, rng.random()
    if choice < 0.35:  # the ground, or all of it, drifts
        shift = rng.normal(size=3).astype(np.float32)
        shift *= drift(rng) / np.abs(shift).mean()
        changed = pixels + shift if rng.random() < 0.4 else np.where(on_ground(pixels, scene), pixels + shift, pixels)
    elif choice < 0.5:  # low-frequency drift
        coarse = rng.normal(size=(3, 4, 4)).astype(np.float32) * drift(rng)
        planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in coarse]
        changed = pixels + np.stack([np.asarray(plane) for plane in planes], axis=-1)
    elif choice < 0.7:  # everything moves by a few pixels
        most = int(rng.choice((6, 20)))
        down, right = rng.integers(-most, most + 1, 2)
        pad = np.pad(pixels, ((most, most), (most, most), (0, 0)), mode="edge")
        changed = pad[most + down : most + down + height, most + right : most + right + width]
        if np.abs(changed - pixels).max() < 15:
            return made  # of a bare ground nothing moves
        moved = float(np.hypot(down, right))
        done, same = made.done * falls(moved, 3.0, 7.0), made.same * falls(moved, 0.5, 3.0)
        return dataclasses.replace(made, pixels=changed, done=done, same=same)
    else:  # something new appears
        side = rng.uniform(easyvqa_edits.SMALLEST, 20.0)
        top, left = rng.uniform(0, (height - side, width - side))
        kind, color = pick(easyvqa.CLASSES, rng), pick(easyvqa.COLORS, rng)
        alpha = easyvqa_edits.coverage(kind, (top, left, top + side, left + side), (height, width))[..., None]
        strength = rng.random()
        changed = pixels + strength * alpha * (np.array(easyvqa.PALETTE[color], np.float32) - pixels)
        seen = falls(strength, 0.08, 0.5)
        done, left_over = made.done * (0.4 + 0.6 * seen), max(made.object_left, 1.0 - seen)
        return dataclasses.replace(made, pixels=changed, done=done, object_left=left_over, same=made.same * seen)
    changed = np.clip(changed, 0, 255)
    error = float(np.abs(changed - pixels)[scene.alpha < 0.01].mean())
    return dataclasses.replace(made, pixels=changed, same=made.same * falls(error, SAME, CHANGED))


def drift(rng: np.random.Generator) -> float:
    """How far a colour drifts, 0 to 255: small as often as large, since what is alike is learned from what is not."""
    return float(np.exp(rng.uniform(0.0, np.log(80.0))))


def spoil(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Faults of an unfinished editor that change nothing about the answers: noise, slight blur, grids, a faint tint."""
    pixels = pixels + rng.normal(scale=0.8, size=3).astype(np.float32)
    if rng.random() < 0.3:
        pixels = blur(pixels, rng.uniform(0.2, 0.7))
    if rng.random() < 0.2:
        step = int(rng.choice((4, 8)))
        grid = np.zeros(pixels.shape[:2], np.float32)
        grid[::step], grid[:, ::step] = 1.0, 1.0
        pixels = pixels + rng.normal(scale=5.0) * grid[..., None]
    if rng.random() < 0.5:
        pixels = pixels + rng.normal(scale=rng.uniform(0.0, 10.0), size=pixels.shape).astype(np.float32)
    return pixels


def on_ground(pixels: np.ndarray, scene: Scene) -> np.ndarray:
    """Where the candidate shows its ground, bool [H, W, 1]."""
    return (np.abs(pixels - scene.ground).sum(-1) < 40)[..., None]


def rises(share: float, even: float = 0.5) -> float:
    """Answer to a share of an edit, even odds at `even`; straight lines in the logit, steep at the copy too."""
    logit = np.interp(share, (0.0, even, 1.0), (-4.0, 0.0, 4.0))
    return float(1.0 / (1.0 + np.exp(-logit)))


def falls(value: float, good: float, bad: float) -> float:
    """1 up to `good`, 0 from `bad` on, a straight line between."""
    return float(np.clip((bad - value) / (bad - good), 0.0, 1.0))


def sure(probability: float) -> float:
    """A probability kept away from 0 and 1."""
    return float(np.clip(probability, 1.0 - SURE, SURE))


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of float pixels 0 to 255, through 8 bits."""
    return np.float32(Image.fromarray(to_uint8(pixels)).filter(ImageFilter.GaussianBlur(sigma)))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Rounds and clips to 0 to 255."""
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def choose(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    """One of the names, each with its share."""
    weights = np.array(list(shares.values()))
    return list(shares)[int(np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(), side="right"))]
