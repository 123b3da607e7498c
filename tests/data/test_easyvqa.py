"""Tests of the embedded data set: what the images show, captions, instructions and edits."""

import numpy as np
import pytest

from npedit_jax.data import easyvqa
from npedit_jax.data.easyvqa import Shape


@pytest.fixture(scope="module")
def test_split():
    return easyvqa.load("test")


def test_sizes_and_types(test_split):
    assert len(test_split) == 1000
    assert test_split.images.shape == (1000, 64, 64, 3) and test_split.images.dtype == np.uint8
    assert test_split.grounds.shape == (1000, 3) and test_split.answered.shape == (1000, 2)
    assert all(shape.color in easyvqa.COLORS and shape.kind in easyvqa.CLASSES for shape in test_split.shapes)


def test_shapes_answer_every_question(test_split):
    asked = 0
    for shape, questions in zip(test_split.shapes, test_split.questions, strict=True):
        for text, answer in questions:
            words = text.rstrip("?").split()
            present = shape.color in words or shape.kind in words
            negated = "not" in words or "no" in words
            wanted = shape.color if "color" in words else shape.kind if "what" in words else present != negated
            assert answer == {True: "yes", False: "no"}.get(wanted, wanted), (shape, text)
            asked += 1
    assert asked > 9000


def test_most_facts_are_answered_and_the_rest_agrees_with_the_palette(test_split):
    assert (test_split.answered.mean(0) > 0.9).all()
    for image, ground, shape in zip(test_split.images, test_split.grounds, test_split.shapes, strict=True):
        far = np.linalg.norm(image.astype(float) - ground, axis=-1) > 60
        assert np.abs(np.median(image[far], axis=0) - easyvqa.PALETTE[shape.color]).max() < 60


def test_grounds_are_pastel(test_split):
    assert test_split.grounds.min() >= 220


def test_unknown_split():
    with pytest.raises(ValueError, match="'validation'"):
        easyvqa.load("validation")


def test_contradicting_answers_are_an_error():
    with pytest.raises(ValueError, match="contradict"):
        easyvqa._facts([("what color is the shape?", "red"), ("is there a red shape?", "no")])


@pytest.mark.parametrize(
    "asked, colors, kinds",
    [
        ([("what is the blue shape?", "rectangle")], {"blue"}, {"rectangle"}),
        ([("is no circle present?", "yes"), ("is there a triangle?", "no")], set(easyvqa.COLORS), {"rectangle"}),
        ([("does the image not contain a teal shape?", "no")], {"teal"}, set(easyvqa.CLASSES)),
    ],
)
def test_facts(asked, colors, kinds):
    assert easyvqa._facts(asked) == (colors, kinds)


def test_canonical_wordings():
    source = Shape("blue", "circle")
    assert easyvqa.caption(source) == "a blue circle on a plain background"
    assert easyvqa.caption(None) == "a plain background"
    expected = {
        "recolor": (Shape("red", "circle"), "make the circle red"),
        "remove": (None, "remove the circle"),
        "replace": (Shape("blue", "triangle"), "replace the circle with a triangle"),
        "nothing": (source, "do nothing."),
    }
    for edit_type, (target, text) in expected.items():
        assert easyvqa.instruction(None, edit_type, source, target) == text


@pytest.mark.parametrize("edit_type", easyvqa.EDIT_TYPES)
def test_drawn_edits(edit_type):
    rng, source = np.random.default_rng(0), Shape("green", "triangle")
    edits = [easyvqa.draw_edit(rng, source, edit_type) for _ in range(200)]
    targets = {edit.target for edit in edits}
    if edit_type == "recolor":
        assert targets == {Shape(color, "triangle") for color in easyvqa.COLORS if color != "green"}
        assert all(edit.target.color in edit.instruction for edit in edits)
    elif edit_type == "replace":
        assert targets == {Shape("green", "circle"), Shape("green", "rectangle")}
        assert all(edit.target.kind in edit.instruction for edit in edits)
    else:
        assert targets == {None if edit_type == "remove" else source}
    assert len({edit.instruction for edit in edits}) >= 3
    assert {edit.instruction for edit in edits} <= set(easyvqa.texts())


def test_captions_are_among_the_texts():
    rng, texts = np.random.default_rng(0), set(easyvqa.texts())
    drawn = {easyvqa.caption(Shape("teal", "circle"), rng) for _ in range(50)}
    assert len(drawn) >= 3 and drawn <= texts
    assert all("teal circle" in text for text in drawn)


@pytest.mark.parametrize(
    "edit_type, target, message",
    [
        ("recolour", None, "unknown edit type"),
        ("remove", Shape("red", "circle"), "does not lead"),
        ("recolor", Shape("red", "circle"), "does not lead"),
        ("recolor", None, "does not lead"),
        ("replace", Shape("blue", "triangle"), "does not lead"),
        ("nothing", None, "does not lead"),
    ],
)
def test_impossible_edits(edit_type, target, message):
    with pytest.raises(ValueError, match=message):
        easyvqa.instruction(None, edit_type, Shape("red", "circle"), target)


def test_fraction_keeps_the_first_images(test_split):
    part = test_split.fraction(0.01)
    assert len(part) == len(part.images) == len(part.questions) == 10
    assert (part.images == test_split.images[:10]).all() and part.shapes == test_split.shapes[:10]
    assert test_split.fraction(1.0).shapes == test_split.shapes
    with pytest.raises(ValueError, match="0 < share <= 1"):
        test_split.fraction(0.0)
