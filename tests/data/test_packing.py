"""Packed questions: what a row holds, and that a scorer answers it as it answers the questions row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax import weights
from npedit_jax.data import easyvqa, packing, pipeline, questions
from npedit_jax.data.batches import Feed, arrays
from npedit_jax.data.easyvqa_source import EasyVQASource
from npedit_jax.data.tokenize import QuestionTokens, ScorerTokenizer, TextTokenizer
from npedit_jax.objectives import feedback
from npedit_jax.training import edit_losses, networks, steps
from tests.training.tiny_networks import SPECS

PACKAGE = "package:pretrained/easyvqa/"
IMAGE_TOKENS, QUESTION, PACKED = 4, 48, 72
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def tokenizer():
    return ScorerTokenizer(networks.resolve(f"{PACKAGE}scorer"), IMAGE_TOKENS, QUESTION)


def asked(tokenizer, edit_type: str) -> list[QuestionTokens]:
    """The prompts of one edit, (edit verification, identity)."""
    edit = easyvqa.draw_edit(np.random.default_rng(0), easyvqa.Shape("red", "circle"), edit_type)
    pair = questions.edit_questions(questions.EASYVQA, edit_type, instruction=edit.instruction, object=edit.object)
    tokens = tokenizer(pair)
    return [QuestionTokens(*(field[row] for field in tokens)) for row in range(2)]


@pytest.mark.parametrize("edit_type", easyvqa.EDIT_TYPES)
def test_each_question_can_be_read_from_the_row(tokenizer, edit_type):
    prompts = asked(tokenizer, edit_type)
    row = packing.pack(prompts, PACKED)
    for number, prompt in enumerate(prompts):
        mine = (row.segments == 0) | (row.segments == 1 + number)
        order = np.argsort(row.positions[mine])
        assert row.positions[mine][order].tolist() == list(range(prompt.mask.sum()))
        assert (row.ids[mine][order] == prompt.ids[prompt.mask]).all()
        assert (row.image_index[mine][order] == prompt.image_index[prompt.mask]).all()
        place = row.answer_place[number]
        assert row.segments[place] == 1 + number and row.positions[place] == prompt.mask.sum() - 1
    assert (row.segments[1:] >= 0).sum() + 1 == np.flatnonzero(row.segments >= 0).max() + 1  # padding is at the end


def test_images_are_shared_unless_the_edit_is_shown_alone(tokenizer):
    for edit_type, images in (("recolor", 2), ("replace", 2), ("remove", 0)):
        row = packing.pack(asked(tokenizer, edit_type), PACKED)
        shared = row.segments == 0
        assert (row.image_index[shared] >= 0).sum() == images * IMAGE_TOKENS
        # The edit alone is shown by its own block, of the second image's rows.
        own = row.image_index[(row.segments == 1) & (row.image_index >= 0)]
        assert own.tolist() == (list(range(IMAGE_TOKENS, 2 * IMAGE_TOKENS)) if edit_type == "remove" else [])


def test_identity_question_comes_first_and_equal_questions_keep_a_token_each(tokenizer):
    prompts = asked(tokenizer, "recolor")
    assert (
        np.flatnonzero(packing.pack(prompts, PACKED).segments == 2).max()
        < packing.pack(prompts, PACKED).answer_place[0]
    )
    same = packing.pack([prompts[0], prompts[0]], PACKED)
    assert same.answer_place.tolist() == [prompts[0].mask.sum(), prompts[0].mask.sum() - 1]


def test_a_row_that_is_too_short_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="raise packed_length"):
        packing.pack(asked(tokenizer, "remove"), 30)


@pytest.fixture(scope="module")
def both_layouts(tokenizer):
    """One batch with every edit type, unpacked and packed."""
    options = dict(
        text=TextTokenizer(networks.resolve(f"{PACKAGE}text_encoder"), 16),
        scorer=tokenizer,
        guidance=dict.fromkeys(easyvqa.EDIT_TYPES, 2.0),
    )
    source = EasyVQASource(easyvqa.load("train").fraction(0.01))
    task = pipeline.Task(source, dict.fromkeys(easyvqa.EDIT_TYPES, 0.25), questions.EASYVQA)
    make = lambda length: arrays(  # noqa: E731
        pipeline.stage_dataset("npedit", {"": task}, Feed(0, 8), packed_length=length, **options)[0]
    )
    return make(0), make(PACKED)


def test_batches_hold_one_layout_or_the_other(both_layouts):
    unpacked, packed = both_layouts
    assert set(unpacked["edit_type"].tolist()) == set(range(len(easyvqa.EDIT_TYPES)))
    assert set(steps.UNPACKED) == set(unpacked) - set(packed)
    assert set(steps.PACKED) == set(packed) - set(unpacked)
    for field in steps.PACKED:
        assert packed[field].shape == ((8, 2) if field == "answer_place" else (8, PACKED))
        assert packed[field].dtype == np.int32
    for field in set(packed) & set(unpacked):
        np.testing.assert_array_equal(packed[field], unpacked[field])


def test_answers_and_gradients_are_those_of_the_unpacked_layout(both_layouts):
    kind, config = SPECS["scorer"]
    config = networks.plain(config)
    config["llm_config"] |= dict(vocab_size=128, num_hidden_layers=2)  # the second sees what all tokens saw
    config["vision_config"]["image_size"] = 16
    module = weights.build(kind, config)
    rng = np.random.default_rng(0)
    assert module.image_tokens == IMAGE_TOKENS
    shapes = networks.shapes(kind, module)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
    reference, edited = (jnp.asarray(rng.uniform(-0.9, 0.9, (8, 8, 8, 3)), jnp.float32) for _ in range(2))

    def loss(params, edited, batch):
        output = edit_losses.answers({"scorer": module}, params, reference, edited, batch)
        arguments = (output.logits, output.logsumexp, batch["answer"], batch["question_weight"])
        losses = [feedback.answer_loss(*arguments, form=form) for form in feedback.FORMS]
        return jnp.sum(losses[0] + 0.5 * losses[1]), (output.logits, output.logsumexp)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (expected, outputs), gradients = step(params, edited, both_layouts[0])
    (found, packed_outputs), packed_gradients = step(params, edited, both_layouts[1])
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE)
    size = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradients[0])))

    def assert_same(found, expected, floor=0.0):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert jnp.linalg.norm(a - b) <= TOLERANCE * jnp.linalg.norm(b) + floor

    assert_same(packed_outputs, outputs)
    assert_same(packed_gradients[1], gradients[1])
    assert_same(packed_gradients[0], gradients[0], floor=1e-6 * size)
    assert jnp.linalg.norm(gradients[1]) > 0
