import numpy as np
import pytest
from PIL import Image, ImageFilter

from npedit_jax.data import easyvqa, easyvqa_edits, easyvqa_reading
from npedit_jax.evaluation import easyvqa_judge

CHANGES = ("recolor", "remove", "replace")


@pytest.fixture(scope="module")
def test_split():
    return easyvqa.load("test")


@pytest.fixture(scope="module")
def readings(test_split):
    return [easyvqa_reading.read(image) for image in test_split.images]


def share_done(split, readings, edit_type, candidate, seed=0):
    """How often `candidate(index, edit)` passes for the edit, over a whole split."""
    rng = np.random.default_rng(seed)
    done = []
    for index, (image, reading) in enumerate(zip(split.images, readings, strict=True)):
        edit = easyvqa.draw_edit(rng, split.shapes[index], edit_type)
        done.append(easyvqa_judge.judge_reading(image, reading, candidate(index, edit), edit).done)
    return np.mean(done)


def blurred(image, sigma):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_every_image_as_the_package_answers(split):
    data = easyvqa.load(split)
    readings = [easyvqa_reading.read(image) for image in data.images]
    colors, kinds = data.answered.T
    assert colors.mean() > 0.7 and kinds.mean() > 0.7
    for reading, shape, color_answered, kind_answered in zip(readings, data.shapes, colors, kinds, strict=True):
        assert reading.color == shape.color or not color_answered
        assert reading.kind == shape.kind or not kind_answered
        assert reading.shape is not None


@pytest.mark.parametrize("edit_type", CHANGES)
def test_what_is_no_edit_scores_nothing(test_split, readings, edit_type):
    images, other = test_split.images, np.random.default_rng(1).permutation(len(test_split))
    noise = np.random.default_rng(2).integers(0, 256, images[0].shape).astype(np.uint8)
    limits = {
        "copy": (lambda index, edit: images[index], 0.0),
        "blurred copy": (lambda index, edit: blurred(images[index], 1 + index % 3), 0.01),
        "unrelated image": (lambda index, edit: images[other[index]], 0.01),
        "noise": (lambda index, edit: noise, 0.0),
    }
    for name, (candidate, limit) in limits.items():
        assert share_done(test_split, readings, edit_type, candidate) <= limit, name


@pytest.mark.parametrize("edit_type", easyvqa.EDIT_TYPES)
def test_edits_by_hand_are_done_and_keep_the_rest(test_split, edit_type):
    rng = np.random.default_rng(3)
    for image, shape in zip(test_split.images, test_split.shapes, strict=True):
        edit = easyvqa.draw_edit(rng, shape, edit_type)
        judgement = easyvqa_judge.judge(image, easyvqa_edits.apply(image, edit), edit)
        assert judgement.done, edit
        assert judgement.kept_error <= 0.5, edit


def test_counting_the_rim_would_fail_edits_by_hand(test_split, readings):
    """Why a recolouring is judged by the solid pixels: on the rim shape and ground mix to any colour."""
    rng, passed = np.random.default_rng(0), []
    for image, reading, shape in zip(test_split.images, readings, test_split.shapes, strict=True):
        edit = easyvqa.draw_edit(rng, shape, "recolor")
        pixels = easyvqa_edits.apply(image, edit)[reading.mask]
        nearest = easyvqa_reading.color_distances(pixels).argmin(-1)
        passed.append((nearest == easyvqa.COLORS.index(edit.target.color)).mean() >= 0.7)
    assert 0.95 < np.mean(passed) < 0.98


def test_a_small_rectangle_may_have_a_line_of_pixels_half_filled_at_a_side():
    """As its round trip through an autoencoder has, however narrow it is; about square it could be a circle."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        height = int(rng.integers(6, 13))
        width = round(height * rng.uniform(1.6, 3.0))
        image = np.full((64, 64, 3), (230, 240, 250), np.uint8)
        image[20 : 20 + height, 10 : 10 + width] = easyvqa.PALETTE["teal"]
        image[20 + height, 10 + rng.permutation(width)[: width // 2]] = easyvqa.PALETTE["teal"]
        image = np.rot90(image, rng.integers(4))
        assert easyvqa_reading.read(image).kind == "rectangle", (height, width)


def test_doing_nothing_is_judged_by_shape_and_colour(test_split, readings):
    images = test_split.images
    assert share_done(test_split, readings, "nothing", lambda index, edit: images[index]) == 1
    assert share_done(test_split, readings, "nothing", lambda index, edit: images[index - 1]) <= 0.01


def test_wrong_edits_are_not_done(test_split):
    image, source = test_split.images[0], test_split.shapes[0]
    rng = np.random.default_rng(4)
    scene = easyvqa_edits.take_apart(image)
    recolor, replace, remove = (easyvqa.draw_edit(rng, source, name) for name in ("recolor", "replace", "remove"))
    wrong_color = next(color for color in easyvqa.COLORS if color not in (source.color, recolor.target.color))
    wrong_kind = next(kind for kind in easyvqa.CLASSES if kind not in (source.kind, replace.target.kind))
    rendered = {
        recolor: (scene.recolored(wrong_color), scene.recolored(recolor.target.color).moved(20, -20)),
        replace: (scene.replaced(wrong_kind), scene.replaced(replace.target.kind).recolored(wrong_color)),
        remove: (scene.moved(20, -20), scene.resized(0.7), scene.recolored(wrong_color)),
    }
    for edit, scenes in rendered.items():
        for wrong in scenes:
            assert not easyvqa_judge.judge(image, wrong.render(), edit).done, edit


SHAPE, AWAY = np.zeros((2, 64, 64), bool)
SHAPE[20:40, 20:40] = True  # a square of 400 pixels
AWAY[45:60, 5:60] = True
RIM = easyvqa_judge.dilate(SHAPE) & ~SHAPE
GROUND, RED, BLUE = (240, 250, 245), easyvqa.PALETTE["red"], easyvqa.PALETTE["blue"]


def red_square(edit_type, *painted):
    """Whether the edit of a red square, to a blue one where it has a target, is done by painting so many pixels."""
    image = easyvqa_edits.draw("rectangle", "red", GROUND, (20, 20, 40, 40))
    edited = image.copy()
    for where, count, rgb in painted:
        rows, columns = np.nonzero(where)
        edited[rows[:count], columns[:count]] = rgb
    source, target = easyvqa.Shape("red", "rectangle"), easyvqa.Shape("blue", "rectangle")
    return easyvqa_judge.judge(image, edited, easyvqa.Edit(edit_type, "", source, target)).done


@pytest.mark.parametrize(
    ("edit_type", "painted", "done", "not_done"),
    [
        ("recolor", lambda count: [(SHAPE, count, BLUE)], 280, 279),  # 70 % of the shape
        ("recolor", lambda count: [(SHAPE, 400, BLUE), (AWAY, count, BLUE)], 266, 267),  # IoU 400 / 666
        ("remove", lambda count: [(SHAPE, count, GROUND)], 340, 339),  # 85 % of the shape
        ("remove", lambda count: [(SHAPE, 340, GROUND), (RIM, count, RED)], 27, 28),  # below 20 % and 8 pixels in all
        ("remove", lambda count: [(SHAPE, 400, GROUND), (AWAY, count, RED)], 8, 9),  # elsewhere
        ("nothing", lambda count: [(AWAY, count, RED)], 99, 100),  # IoU 400 / 499
    ],
)
def test_one_pixel_decides(edit_type, painted, done, not_done):
    assert red_square(edit_type, *painted(done))
    assert not red_square(edit_type, *painted(not_done))


def test_a_replaced_shape_is_in_place_up_to_ten_pixels_aside():
    """The boxes' IoU is then 200 / 600, and 180 / 620 with one more."""
    image = easyvqa_edits.draw("rectangle", "red", GROUND, (20, 20, 40, 40))
    edit = easyvqa.Edit("replace", "", easyvqa.Shape("red", "rectangle"), easyvqa.Shape("red", "circle"))
    for aside, done in ((10, True), (11, False)):
        moved = easyvqa_edits.draw("circle", "red", GROUND, (20, 20 + aside, 40, 40 + aside))
        assert easyvqa_judge.judge(image, moved, edit).done == done


def test_kept_error_counts_only_what_had_to_stay():
    ground = (240, 250, 245)
    image = easyvqa_edits.draw("circle", "red", ground, (20, 20, 40, 40))
    edited = easyvqa_edits.draw("circle", "blue", ground, (20, 20, 40, 40))
    edit = easyvqa.Edit("recolor", "", easyvqa.Shape("red", "circle"), easyvqa.Shape("blue", "circle"))
    assert easyvqa_judge.judge(image, edited, edit).kept_error < 0.1
    edited[:] -= np.array([9, 0, 0], np.uint8)
    assert easyvqa_judge.judge(image, edited, edit).kept_error == pytest.approx(3, abs=0.1)


def test_dilate_grows_by_one_pixel_each_way_and_stops_at_the_border():
    mask = np.zeros((5, 5), bool)
    mask[0, 2] = True
    assert easyvqa_judge.dilate(mask).sum() == 6 and easyvqa_judge.dilate(mask)[:2, 1:4].all()


def test_bad_input_is_refused(test_split):
    image, shape = test_split.images[0], test_split.shapes[0]
    edit = easyvqa.draw_edit(np.random.default_rng(0), shape, "remove")
    with pytest.raises(ValueError, match="uint8"):
        easyvqa_reading.read(image / 255)
    with pytest.raises(ValueError, match="one size"):
        easyvqa_judge.judge(image, image[:32], edit)
    with pytest.raises(ValueError, match="no shape"):
        easyvqa_judge.judge(np.full_like(image, 240), image, edit)
    with pytest.raises(ValueError, match="edit types"):
        easyvqa_judge.judge(image, image, easyvqa.Edit("rotate", "", shape, shape))
