"""The scorer's examples: answers follow what is to be seen, faults alone decide nothing, draws are repeatable."""

import collections
import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from npedit_jax.data import easyvqa, easyvqa_edits, easyvqa_reading, questions, scorer_pairs
from npedit_jax.evaluation import easyvqa_judge


@pytest.fixture(scope="module")
def data():
    return easyvqa.load("train").fraction(0.1)


@pytest.fixture(scope="module")
def source(data):
    return scorer_pairs.PairSource(data, questions.EASYVQA)


@pytest.fixture(scope="module")
def examples(source):
    return [source(index % 400, np.random.default_rng(index)) for index in range(1500)]


def test_same_draw_gives_the_same_example(source):
    first, again = (source(7, np.random.default_rng(3)) for _ in range(2))
    assert first.questions == again.questions
    np.testing.assert_array_equal(first.images, again.images)


def test_shapes_kinds_and_probabilities(examples, data):
    for example in examples:
        assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in example.images)
        assert 1 <= len(example.questions) <= 3
        assert len({questions.EASYVQA[asked.kind].images for asked in example.questions}) == 1
        for asked in example.questions:
            assert asked.kind in questions.EASYVQA and asked.text
            assert 0.0 < asked.answer < 1.0
            assert asked.word in ("Yes", *easyvqa.COLORS, *easyvqa.CLASSES)


def test_every_kind_of_question_has_both_answers(examples):
    for kind in set(questions.EASYVQA) - {"look"}:
        asked = [item for example in examples for item in example.questions if item.kind == kind and item.word == "Yes"]
        answers = np.array([item.answer for item in asked])
        assert 0.15 < (answers > 0.5).mean() < 0.85, kind


def test_looks_say_what_the_images_show(source, data):
    seen = {1: 0, 2: 0}
    for index in range(300):
        example = source(index, np.random.default_rng(index))
        for asked in example.questions:
            if asked.kind == "look":
                number = 1 if "image-1" in asked.text else 2
                reading = easyvqa_reading.read(example.images[number - 1])
                if reading.shape is not None and len(example.questions) > 2:  # side effects may hide a shape
                    seen[number] += asked.word in (reading.color, reading.kind)
                    assert number == 2 or asked.word in (data.shapes[index].color, data.shapes[index].kind)
    assert min(seen.values()) > 40


def test_an_unrelated_image_is_no_edit_and_not_the_same(monkeypatch, data, source):
    monkeypatch.setattr(scorer_pairs, "UNRELATED_SHARE", 1.0)
    monkeypatch.setattr(scorer_pairs, "SIDE_EFFECT_SHARE", 0.0)
    monkeypatch.setattr(scorer_pairs, "SHARES", {"edit": 1.0})
    counted = 0
    for index in range(60):
        example = source(index, np.random.default_rng(index))
        for asked in example.questions:
            if asked.kind == "edit_remove":  # an object is to be seen
                assert asked.answer > 0.9
            elif asked.kind != "look":
                assert asked.answer < 0.1
                counted += 1
    assert counted > 60


def test_other_edits_are_answered_by_what_is_to_be_seen(data, source):
    red = easyvqa.Shape("red", "circle")
    edit, rng = easyvqa.draw_edit(np.random.default_rng(0), red, "recolor"), np.random.default_rng(1)
    pixels = np.zeros((64, 64, 3), np.float32)
    made = scorer_pairs.Candidate(pixels, 0.7, 1.0)
    paraphrase, other = dataclasses.replace(edit, instruction="paint it"), easyvqa.draw_edit(rng, red, "replace")
    assert scorer_pairs.carried_out(paraphrase, edit, made) == 0.7
    assert scorer_pairs.carried_out(other, edit, made) == 0.0  # half a colour is no other class
    another = dataclasses.replace(edit, target=easyvqa.Shape("gray", "circle"))
    assert scorer_pairs.carried_out(another, edit, made) is None  # it may lie on the way
    assert scorer_pairs.carried_out(another, edit, dataclasses.replace(made, shape=another.target)) == 1.0
    assert scorer_pairs.carried_out(another, edit, dataclasses.replace(made, shape=red)) == 0.0
    nothing = easyvqa.draw_edit(rng, red, "nothing")
    assert scorer_pairs.carried_out(other, nothing, made) is None


def test_first_image_is_always_an_image_of_the_data(source, data):
    for index in range(50):
        np.testing.assert_array_equal(source(index, np.random.default_rng(index)).images[0], data.images[index])


@pytest.mark.parametrize("edit_type", ["recolor", "remove", "replace"])
def test_answers_agree_with_the_pixel_judge(edit_type, source, data):
    """Candidates that are surely done or surely not, without side effects or faults."""
    agreed, rng = [], np.random.default_rng(0)
    for index in range(400):
        edit = easyvqa.draw_edit(rng, data.shapes[index], edit_type)
        made = scorer_pairs.candidate(source.scene(index), edit, rng)
        answer = 1.0 - made.object_left if edit_type == "remove" and made.same > 0.5 else made.done
        if 0.1 < answer < 0.95:
            continue
        judged = easyvqa_judge.judge(data.images[index], scorer_pairs.to_uint8(made.pixels), edit).done
        agreed.append(judged == (answer > 0.5))
    assert len(agreed) > 150
    assert np.mean(agreed) > 0.93


def test_more_of_the_edit_is_a_surer_yes():
    shares = np.linspace(0, 1, 21)
    answers = [scorer_pairs.rises(share) for share in shares]
    assert np.all(np.diff(answers) > 0) and answers[0] < 0.02 and answers[-1] > 0.98
    logits = np.log(answers) - np.log1p(-np.array(answers))
    np.testing.assert_allclose(np.diff(logits), 0.4, rtol=1e-6)


@pytest.mark.parametrize("kind", easyvqa.CLASSES)
def test_outlines_on_the_way_are_crisp_and_those_far_from_both_are_of_no_class(kind, source, data):
    """As the pixel judge reads them; how sure the answer is rises all the way."""
    known, strays = {True: [], False: []}, []
    for index in (i for i, shape in enumerate(data.shapes) if shape.kind != kind):
        scene = source.scene(index)
        goal = scene.replaced(kind)
        for share in (0.0, 0.4, 0.9):
            image = scorer_pairs.to_uint8(np.float32(scorer_pairs.morph(scene, goal, share).render()))
            neither = np.minimum(*(np.abs(image - rgb).sum(-1) for rgb in (scene.ground, scene.rgb))) > 40
            mask = easyvqa_reading.read(image).mask
            rim = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask, iterations=2, border_value=1)
            strays.append((neither & ~rim).sum())
            known[share == 0.9].append(easyvqa_reading.read(image).kind == kind)
    assert np.mean(strays) < 0.5, "an outline is a line of pixels, not a ramp"
    assert np.mean(known[True]) > 0.85 and np.mean(known[False]) < 0.05
    answers = [scorer_pairs.rises(share, scorer_pairs.BLUNT) for share in np.linspace(0, 1, 20)]
    assert answers == sorted(answers) and answers[8] < 0.2 and answers[-2] > 0.9


@pytest.mark.parametrize("kind", easyvqa.CLASSES)
def test_uneven_outlines_are_answered_at_least_as_strictly_as_they_are_judged(kind, source, data):
    rng, judged, answers = np.random.default_rng(0), {0.35: [], 1.0: [], 4.0: []}, {0.35: [], 1.0: [], 4.0: []}
    for index in [index for index, shape in enumerate(data.shapes) if shape.kind != kind][:80]:
        scene, before = source.scene(index), data.shapes[index]
        edit = easyvqa.Edit("replace", "", before, easyvqa.Shape(before.color, kind))
        for times in judged:
            amplitude = times * scorer_pairs.UNEVEN[kind]
            made = scorer_pairs.warped(scorer_pairs.goal(scene, edit, rng), edit, amplitude, rng)
            image = scorer_pairs.to_uint8(made.pixels)
            judged[times].append(easyvqa_judge.judge(data.images[index], image, edit).done)
            answers[times].append(made.done)
            assert made.same == 1.0 and (made.shape is None) == (made.done <= scorer_pairs.BLUNT)
    share = {times: np.mean(done) for times, done in judged.items()}
    assert share[0.35] > 0.7 and 0.5 < share[1.0] < share[0.35] and share[4.0] < 0.3, share
    assert min(answers[0.35]) > 0.9 and max(answers[4.0]) < 0.1 and set(answers[1.0]) == {0.5}


@pytest.mark.parametrize(("kind", "surely_not", "most"), [("circle", 0.02, 0.1), ("rectangle", 0.06, 0.35)])
def test_a_misshapen_outline_is_answered_more_strictly_than_it_is_judged(source, kind, surely_not, most):
    """Where Yes is likelier than No all are read as what they are to be; where it is out of the question few."""
    read = collections.defaultdict(list)
    for index in range(400):
        rng = np.random.default_rng(index)
        edit = easyvqa.draw_edit(rng, source._data.shapes[index], "replace")
        if edit.target.kind == kind:
            made = scorer_pairs.candidate(source.scene(index), edit, rng, {"misshaped": 1.0})
            found = easyvqa_reading.read(scorer_pairs.to_uint8(made.pixels)).kind
            read["yes" if made.done > 0.5 else "no" if made.done < surely_not else "between"].append(found == kind)
    assert np.mean(read["yes"]) > 0.95 and np.mean(read["no"]) < most and min(map(len, read.values())) > 10


def test_a_new_outline_is_asked_about_every_class_where_the_shape_is_clear(monkeypatch, data):
    monkeypatch.setattr(scorer_pairs, "SHARES", {"outline": 1.0})
    source, asked = scorer_pairs.PairSource(data, questions.EASYVQA, 4), {}
    for index in range(200):
        first, *looks = source(index, np.random.default_rng(index)).questions
        assert first.kind == "edit" and {(look.kind, look.word) for look in looks} == {("look", "Yes")}
        kinds = {kind: look.answer for look in looks for kind in easyvqa.CLASSES if kind in look.text}
        likely = [kind for kind, answer in kinds.items() if answer > 0.5]
        assert first.answer in kinds.values() and len(likely) <= 1
        if len(kinds) > 1:
            assert set(kinds) == set(easyvqa.CLASSES) and likely
        asked.setdefault(len(kinds), []).append(first.answer)
    assert set(asked) == {1, 3}
    assert min(len(answers) for answers in asked.values()) > 40
    assert min(asked[1]) < 0.1 and max(asked[3]) > 0.9


@pytest.mark.parametrize("edit_type", ["recolor", "nothing"])
def test_an_old_outline_may_be_uneven_as_far_as_it_covers_the_old_one(edit_type, source, data):
    rng, judged = np.random.default_rng(0), {True: [], False: []}
    for index in range(150):
        edit = easyvqa.draw_edit(rng, data.shapes[index], edit_type)
        amplitude = float(np.exp(rng.uniform(-1.5, 1.5)))
        made = scorer_pairs.warped(scorer_pairs.goal(source.scene(index), edit, rng), edit, amplitude, rng)
        done = easyvqa_judge.judge(data.images[index], scorer_pairs.to_uint8(made.pixels), edit).done
        assert made.same <= made.done
        if not 0.35 < made.done < 0.65:
            judged[made.done > 0.5].append(done)
    assert len(judged[True]) > 30 and np.mean(judged[True]) > 0.9
    assert len(judged[False]) > 10 and np.mean(judged[False]) < 0.4


def test_side_effects_lower_the_identity_answer_by_how_much_changed(source):
    rng = np.random.default_rng(0)
    scene = source.scene(3)
    whole = scorer_pairs.Candidate(np.float32(scene.render()), 1.0, 0.0)
    seen = []
    for _ in range(400):
        changed = scorer_pairs.side_effect(dataclasses.replace(whole), scene, rng)
        seen.append((float(np.abs(changed.pixels - whole.pixels).mean()), changed.same))
    small = [same for error, same in seen if error < 0.3]
    large = [same for error, same in seen if error > 10]
    assert min(small) > 0.5 and np.mean(small) > 0.85
    assert max(large) < 0.3


def test_faults_lie_on_both_answers_alike(examples):
    """Mean roughness of candidates must not tell Yes from No."""
    rough = {True: [], False: []}
    for example in examples:
        for asked in example.questions[:1]:
            if asked.kind == "edit" and not 0.1 < asked.answer < 0.9:
                pixels = example.images[1].astype(float)
                corner = pixels[:6, :6]
                rough[asked.answer > 0.5].append(np.abs(np.diff(corner, axis=0)).mean())
    assert 0.7 < np.mean(rough[True]) / np.mean(rough[False]) < 1.4


def test_wrong_edits_are_not_the_edit(source, data):
    rng = np.random.default_rng(1)
    for index in range(100):
        for edit_type in ("recolor", "replace"):
            edit = easyvqa.draw_edit(rng, data.shapes[index], edit_type)
            made = scorer_pairs.wrong(source.scene(index), edit, rng)
            assert made.done <= 0.3
            hand = easyvqa_edits.apply(data.images[index], edit)
            assert np.abs(made.pixels - hand).max() > 30
