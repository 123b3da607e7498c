"""Tests of the question templates."""

import string

import pytest

from npedit_jax.data import questions


@pytest.mark.parametrize("task", ["editing", "easyvqa"])
def test_tasks_hold_the_same_kinds_with_the_same_meaning(task):
    table = questions.templates(task)
    assert {kind: (template.images, template.answer) for kind, template in table.items()} == {
        "edit": ((0, 1), True),
        "edit_remove": ((1,), False),
        "identity": ((0, 1), True),
        "identity_remove": ((0, 1), True),
        "vqa": ((1,), True),
        "look": ((0, 1), True),
    }


def test_customization_asks_for_the_prompt_in_the_edit_alone_and_for_the_subject_in_both():
    table = questions.templates("customization")
    edit, identity = questions.edit_questions(table, "customization", instruction="the mug on a beach", object="mug")
    assert (edit.images, edit.answer) == ((1,), 1.0) and "the mug on a beach" in edit.text
    assert (identity.images, identity.answer) == ((0, 1), 1.0) and "beach" not in identity.text
    assert "same subject" in identity.text


def test_every_task_of_full_size_has_a_prefix_of_its_own():
    assert questions.TASK_PREFIXES.keys() == {"editing", "customization"} <= questions.TEMPLATES.keys()
    assert len(set(questions.TASK_PREFIXES.values())) == 2


def test_remove_never_shows_the_instruction():
    # Asked whether the instruction was done, a scorer answers Yes to "remove" too easily: it is asked for the object.
    for table in (questions.EDITING, questions.EASYVQA):
        for kind in ("edit_remove", "identity_remove"):
            gaps = {name for _, name, _, _ in string.Formatter().parse(table[kind].text) if name}
            assert gaps == {"object"}


def test_edit_questions():
    table = questions.templates("easyvqa")
    edit, identity = questions.edit_questions(table, "recolor", instruction="make the circle red", object="circle")
    assert (edit.kind, edit.images, edit.answer) == ("edit", (0, 1), 1.0) and "make the circle red" in edit.text
    assert (identity.kind, identity.answer) == ("identity", 1.0) and "make the circle red" in identity.text
    edit, identity = questions.edit_questions(table, "remove", instruction="remove the circle", object="circle")
    assert (edit.kind, edit.images, edit.answer) == ("edit_remove", (1,), 0.0) and "a circle" in edit.text
    assert (identity.kind, identity.answer) == ("identity_remove", 1.0) and "circle" in identity.text


def test_easyvqa_wordings_are_lower_case():
    for template in questions.EASYVQA.values():
        assert template.text == template.text.lower()


def test_a_config_replaces_and_adds_questions():
    changes = dict(
        edit=dict(text="done? {instruction}", images=[0, 1], answer=True),
        edit_style=dict(text="is the old style of {object} gone?", images=(1,), answer=False),
    )
    table = questions.templates("editing", changes)
    assert table["identity"] == questions.EDITING["identity"] and len(table) == len(questions.EDITING) + 1
    asked = {name: questions.edit_questions(table, name, instruction="b", object="a")[0] for name in ("style", "text")}
    assert asked["style"] == questions.Question("edit_style", "is the old style of a gone?", (1,), 0.0)
    assert asked["text"] == questions.Question("edit", "done? b", (0, 1), 1.0)


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("edit", dict(text="{instructions}?", images=(1,), answer=True), "gaps .'instructions'."),
        ("edit", dict(text="{}?", images=(1,), answer=True), "gaps"),
        ("edit", dict(text="?", images=(2,), answer=True), "must show images"),
        ("edit", dict(text="?", images=(), answer=True), "must show images"),
        ("edit", dict(text="?", images=(1,), answer="Yes"), "answered with True or False"),
        ("edit", dict(text="?", images=(1,)), "expected answer, images, text"),
        ("style", dict(text="?", images=(1,), answer=True), "edit_TYPE"),
    ],
)
def test_questions_of_a_config_that_are_none_are_told(kind, given, told):
    with pytest.raises(ValueError, match=told):
        questions.templates("editing", {kind: given})


def test_unknown_templates_are_named():
    with pytest.raises(ValueError, match="unknown question templates 'painting'; choose one of .*easyvqa"):
        questions.templates("painting")


def test_ask():
    table = questions.templates("easyvqa")
    assert questions.ask(table, "vqa", question="is there a circle?", answer=0.25).answer == 0.25
    assert questions.ask(table, "vqa", question="is there a circle?").text == "is there a circle?"
    with pytest.raises(ValueError, match="needs 'instruction'"):
        questions.ask(table, "edit", object="circle")
    with pytest.raises(ValueError, match="unknown question kind"):
        questions.ask(table, "style")


def test_braces_in_an_instruction_stay():
    assert "{object}" in questions.ask(questions.EDITING, "edit", instruction="write {object} on it").text
