"""What each stage trains on: its batches, by the stage's name.

Shapes: B batch, H height, W width, L text tokens, Q questions per sample, S tokens of a question's prompt.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from npedit_jax.data import easyvqa, easyvqa_edits
from npedit_jax.data import questions as questions_lib
from npedit_jax.data.batches import Draw, Feed, QuestionCache, Sample, TextCache, batches
from npedit_jax.data.tokenize import ScorerTokenizer, TextTokenizer

Pairs = Callable[[int, np.random.Generator], Any]  # (image number, rng) -> images and questions about them


def stage_dataset(
    stage: str, data: easyvqa.EasyVQA, feed: Feed, *, fraction: float = 1.0, **options: Any
) -> grain.MapDataset:
    """The batches of a stage.

    Args:
      fraction: share of the images to train on, the first ones.
      options: those of the stage's function in this module.

    Raises:
      ValueError: unknown stage, or a fraction outside (0, 1].
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; choose one of {tuple(STAGES)}")
    return STAGES[stage](data.fraction(fraction), feed, **options)


def autoencoder(
    data: easyvqa.EasyVQA, feed: Feed, *, plain_share: float = 0.0, redraw: float = 0.0, flip: float = 0.0
) -> grain.MapDataset:
    """{"image": uint8 [B, H, W, 3]}; options as in `base`."""

    def sample(draw, index, rng):
        return {"image": draw(data, index, rng)[0]}

    return batches(_picture_streams(sample, plain_share, redraw=redraw, flip=flip), len(data), feed)


def base(
    data: easyvqa.EasyVQA,
    feed: Feed,
    *,
    text: TextTokenizer,
    caption_dropout: float = 0.1,
    plain_share: float = 0.0,
    redraw: float = 0.0,
    flip: float = 0.0,
    instruction_share: float = 0.0,
) -> grain.MapDataset:
    """{"image": uint8 [B, H, W, 3], "caption_ids": int32 [B, L], "caption_mask": bool [B, L]}.

    Args:
      caption_dropout: probability of the empty caption.
      plain_share: share of images that are the bare ground, so that the model knows the empty picture.
      redraw: probability that an image's shape gives way to one drawn anew: any colour, class, place and size.
      flip: probability that an image is mirrored left to right.
      instruction_share: probability that an instruction which would lead to the image stands in for its caption. A text
        encoder that learns here alone would otherwise never meet the words of instructions. No other image is seen.
    """
    captions = TextCache(text)

    def sample(draw, index, rng):
        image, shape = draw(data, index, rng)
        instructed = rng.random() < instruction_share
        words = easyvqa.instruction_towards(shape, rng) if instructed else easyvqa.caption(shape, rng)
        return {"image": image} | captions.fields("caption", _drop(words, caption_dropout, rng))

    return batches(_picture_streams(sample, plain_share, redraw=redraw, flip=flip), len(data), feed)


def warmup(data: easyvqa.EasyVQA, feed: Feed, *, text: TextTokenizer, caption_dropout: float = 0.1) -> grain.MapDataset:
    """{"reference": uint8 [B, H, W, 3], "caption_ids": int32 [B, L], "caption_mask": bool [B, L]}: its own caption."""
    captions = TextCache(text)

    def sample(index, rng):
        caption = _drop(easyvqa.caption(data.shapes[index], rng), caption_dropout, rng)
        return {"reference": data.images[index]} | captions.fields("caption", caption)

    return batches({"all": (1.0, sample)}, len(data), feed)


def npedit(
    data: easyvqa.EasyVQA,
    feed: Feed,
    *,
    text: TextTokenizer,
    scorer: ScorerTokenizer,
    templates: questions_lib.Templates,
    edit_weights: Mapping[str, float],
    guidance: Mapping[str, float],
    question_weights: tuple[float, float] = (1.0, 1.0),
    negative_prompt: str = "",
    packed_length: int = 0,
) -> grain.MapDataset:
    """Reference images with instructions, edited captions and questions: never an edited image.

    {"reference": uint8 [B, H, W, 3]; "instruction_ids", "caption_ids": int32 [B, L], and their "_mask": bool [B, L],
    the caption being that of the edited image; "question_ids", "image_index": int32 [B, 2, S], "question_mask":
    bool [B, 2, S], "answer": int32 [B, 2] (1 yes, 0 no), "question_weight": float32 [B, 2], all of edit verification,
    then identity; "guidance", "dmd_weight", "identity_weight" (1 on "nothing"), "weight" (0 on a bad record):
    float32 [B]; "edit_type": int32 [B], index into easyvqa.EDIT_TYPES; "negative_ids": int32 [1, L], "negative_mask":
    bool [1, L], of the whole batch}. With inner batches each has a leading T. Packed questions come as "packed_ids",
    "packed_positions", "packed_segments", "packed_image_index": int32 [B, packed_length] and "answer_place": int32
    [B, 2] in the place of the three "question_" and "image_index" arrays.

    Args:
      edit_weights: share of each edit type, in any unit; exact over a stretch of steps.
      guidance: guidance scale of the real score by edit type.
      question_weights: of edit verification and identity; "nothing" is asked the identity question alone.
      negative_prompt: what the real score is guided away from.
      packed_length: tokens of the row that both questions are packed into; 0 gives each question a row of its own.

    Raises:
      ValueError: unknown edit type, or one without a guidance scale.
    """
    unknown = [name for name in edit_weights if name not in easyvqa.EDIT_TYPES or name not in guidance]
    if unknown:
        raise ValueError(f"edit types {unknown} need a guidance scale and must be among {easyvqa.EDIT_TYPES}")
    texts, prompts = TextCache(text), QuestionCache(scorer)

    def sample(edit_type, index, rng):
        edit = easyvqa.draw_edit(rng, data.shapes[index], edit_type)
        asked = questions_lib.edit_questions(templates, edit_type, instruction=edit.instruction, object=edit.object)
        nothing = edit_type == "nothing"
        return {
            "reference": data.images[index],
            **texts.fields("instruction", edit.instruction),
            **texts.fields("caption", easyvqa.caption(edit.target, rng)),
            **prompts.fields(asked, len(asked), packed_length),
            "answer": np.array([question.answer for question in asked], np.int32),
            "question_weight": np.array((0.0 if nothing else question_weights[0], question_weights[1]), np.float32),
            "guidance": np.float32(guidance[edit_type]),
            "dmd_weight": np.float32(1.0),
            "identity_weight": np.float32(nothing),
            "weight": np.float32(1.0),
            "edit_type": np.int32(easyvqa.EDIT_TYPES.index(edit_type)),
        }

    streams = {name: (weight, functools.partial(sample, name)) for name, weight in edit_weights.items()}
    leading = (feed.inner_batches, 1) if feed.inner_batches else (1,)
    negative = {
        key: np.broadcast_to(value, (*leading, *value.shape))
        for key, value in texts.fields("negative", negative_prompt).items()
    }
    return batches(streams, len(data), feed).map(lambda batch: batch | negative)


def scorer(
    data: easyvqa.EasyVQA,
    feed: Feed,
    *,
    tokenizer: ScorerTokenizer,
    templates: questions_lib.Templates,
    questions: int,
    pairs: Pairs,
    packed_length: int = 0,
) -> grain.MapDataset:
    """Image pairs and questions about them, the answers as probabilities of Yes.

    {"images": uint8 [B, 2, H, W, 3], "question_ids", "image_index": int32 [B, Q, S], "question_mask": bool [B, Q, S],
    "answer_ids": int32 [B, Q, 2], of No and of Yes or whichever word answers the question, "answer", "question_weight":
    float32 [B, Q]}; where a pair has fewer than Q questions, the rest repeats the first one at weight 0. Packed
    questions as in `npedit`.

    Args:
      templates: say which images each kind of question shows.
      questions: Q, the most questions that a pair comes with.
      pairs: (image number, rng) -> an example with `images` and `questions`, see `scorer_pairs.ScorerExample`.
      packed_length: as in `npedit`.
    """
    prompts = QuestionCache(tokenizer)
    answer_ids = {word: tokenizer.answer_id(word) for word in ("No", "Yes", *easyvqa.COLORS, *easyvqa.CLASSES)}

    def sample(index, rng):
        example = pairs(index, rng)
        if len(example.questions) > questions:
            raise ValueError(
                f"a pair came with {len(example.questions)} questions and the batch has room for {questions}; raise it"
            )
        asked = [
            questions_lib.Question(kind, text, templates[kind].images, answer)
            for kind, text, answer, *_ in example.questions
        ]
        pad = questions - len(asked)
        words = [answer_ids[question.word] for question in example.questions]
        return {
            "images": np.stack(example.images),
            **prompts.fields(asked, questions, packed_length),
            "answer_ids": np.array([(answer_ids["No"], word) for word in words + words[:1] * pad], np.int32),
            "answer": np.array([question.answer for question in asked] + [0.0] * pad, np.float32),
            "question_weight": np.array([question.weight for question in example.questions] + [0.0] * pad, np.float32),
        }

    return batches({"all": (1.0, sample)}, len(data), feed)


def supervised(
    data: easyvqa.EasyVQA, feed: Feed, *, text: TextTokenizer, edit_weights: Mapping[str, float]
) -> grain.MapDataset:
    """Pairs made by pixel operations, for the upper bound that the editor's training is compared with.

    {"reference", "target": uint8 [B, H, W, 3], "instruction_ids": int32 [B, L], "instruction_mask": bool [B, L]}.

    Args:
      edit_weights: share of each edit type, in any unit.
    """
    texts = TextCache(text)

    def sample(edit_type, index, rng):
        edit = easyvqa.draw_edit(rng, data.shapes[index], edit_type)
        images = {"reference": data.images[index], "target": easyvqa_edits.apply(data.images[index], edit)}
        return images | texts.fields("instruction", edit.instruction)

    streams = {name: (weight, functools.partial(sample, name)) for name, weight in edit_weights.items()}
    return batches(streams, len(data), feed)


STAGES: Mapping[str, Callable[..., grain.MapDataset]] = {
    "autoencoder": autoencoder,
    "base": base,
    "warmup": warmup,
    "npedit": npedit,
    "scorer": scorer,
    "supervised": supervised,
}


def _picture_streams(
    sample: Callable[..., Sample], plain_share: float, **changes: float
) -> dict[str, tuple[float, Draw]]:
    return {
        "shape": (1.0 - plain_share, functools.partial(sample, functools.partial(_draw_picture, **changes))),
        "plain": (plain_share, functools.partial(sample, _draw_plain)),
    }


def _drop(text: str, probability: float, rng: np.random.Generator) -> str:
    return "" if rng.random() < probability else text


def _draw_plain(data: easyvqa.EasyVQA, index: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    """An image's bare ground."""
    del rng
    return np.broadcast_to(data.grounds[index], data.images[index].shape), None


def _draw_picture(
    data: easyvqa.EasyVQA, index: int, rng: np.random.Generator, redraw: float, flip: float
) -> tuple[np.ndarray, easyvqa.Shape]:
    """An image of the data, or another shape on its ground."""
    image, shape = data.images[index], data.shapes[index]
    if rng.random() < redraw:
        shape = easyvqa.Shape(_pick(easyvqa.COLORS, rng), _pick(easyvqa.CLASSES, rng))
        image = _redraw(data.grounds[index], shape, image.shape[:2], rng)
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
    coverage = easyvqa_edits.coverage(shape.kind, box, size)[..., None]
    color = np.array(easyvqa.PALETTE[shape.color], np.float32)
    return np.rint(ground + coverage * (color - ground)).astype(np.uint8)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
