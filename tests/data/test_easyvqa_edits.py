import numpy as np
import pytest

from npedit_jax.data import easyvqa, easyvqa_edits, easyvqa_reading


@pytest.fixture(scope="module")
def data():
    return easyvqa.load("test")


@pytest.fixture(scope="module")
def scenes(data):
    return [easyvqa_edits.take_apart(image) for image in data.images]


def difference(a, b):
    return np.abs(a.astype(int) - b)


def test_an_image_taken_apart_renders_back(data, scenes):
    for image, scene in zip(data.images, scenes, strict=True):
        assert difference(scene.render(), image).max() <= 2


def test_shapes_are_drawn_as_easyvqa_draws_them(data, scenes):
    """Rectangles exactly; circles and triangles up to how a library rounds a slanted edge."""
    errors = {kind: [] for kind in easyvqa.CLASSES}
    for image, scene in zip(data.images, scenes, strict=True):
        drawn = scene.drawn(scene.kind, scene.box)
        errors[scene.kind].append(
            (difference(drawn.render(), image).max(), abs(drawn.alpha - scene.alpha).sum() / scene.alpha.sum())
        )
    worst, share = ({kind: np.array(values)[:, i] for kind, values in errors.items()} for i in (0, 1))
    assert worst["rectangle"].max() <= 2
    assert share["circle"].mean() < 0.06 and share["triangle"].mean() < 0.06


def test_edits_change_what_they_name_and_nothing_else(data, scenes):
    for image, scene in zip(data.images[:100], scenes[:100], strict=True):
        other_kind = next(kind for kind in easyvqa.CLASSES if kind != scene.kind)
        read = {
            "recolor": easyvqa_reading.read(easyvqa_edits.recolor(image, "teal")),
            "replace": easyvqa_reading.read(easyvqa_edits.replace(image, other_kind)),
            "move": easyvqa_reading.read(scene.moved(5, -7).render()),
        }
        before = easyvqa_reading.read(image)
        assert read["recolor"].shape == easyvqa.Shape("teal", scene.kind)
        assert read["replace"].shape == easyvqa.Shape(before.color, other_kind)
        assert read["move"].shape == before.shape
        assert not easyvqa_reading.read(easyvqa_edits.remove(image)).mask.any()


def test_move_and_resize_do_so_by_the_given_amount():
    scene = easyvqa_edits.take_apart(easyvqa_edits.draw("rectangle", "black", (240, 240, 240), (20, 24, 36, 40)))
    rows, columns = np.nonzero(easyvqa_reading.read(scene.moved(5, -7).render()).mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (25, 40, 17, 32)
    rows, columns = np.nonzero(easyvqa_reading.read(scene.resized(0.5).render()).mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 31, 28, 35)
    rows, _ = np.nonzero(easyvqa_reading.read(scene.moved(99, 0).render()).mask)
    assert (rows.min(), rows.max()) == (48, 63)


@pytest.mark.parametrize("kind", easyvqa.CLASSES)
def test_every_size_drawn_is_read_as_its_kind(kind):
    rng = np.random.default_rng(0)
    for color in easyvqa.COLORS:
        for _ in range(25):
            side, (y, x) = rng.uniform(9, 33), rng.uniform(0, 64, 2)
            box = easyvqa_edits.box_like((y, x, y + side, x + side), kind, (64, 64))
            image = easyvqa_edits.draw(kind, color, rng.integers(230, 256, 3), box)
            assert easyvqa_reading.read(image).shape == easyvqa.Shape(color, kind), box


def test_an_unknown_kind_and_an_empty_image_are_refused():
    with pytest.raises(ValueError, match="hexagon"):
        easyvqa_edits.coverage("hexagon", (0, 0, 9, 9), (64, 64))
    with pytest.raises(ValueError, match="one easy-VQA shape"):
        easyvqa_edits.take_apart(np.full((64, 64, 3), 240, np.uint8))
