"""What each stage trains on: its batches, by the stage's name.

Shapes: B batch, H height, W width, L text tokens, Q questions per sample, S tokens of a question's prompt.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from npedit_jax.data import batches as batches_lib
from npedit_jax.data import easyvqa, easyvqa_edits, edit_types
from npedit_jax.data import questions as questions_lib
from npedit_jax.data.batches import Feed, QuestionCache, Sample, Stream, TextCache, batches, notes
from npedit_jax.data.sources import Example, Pool, Source, Unusable
from npedit_jax.data.tokenize import ScorerTokenizer, TextError, TextTokenizer

Pairs = Callable[[int, np.random.Generator], Any]  # (image number, rng) -> images and questions about them
# (example, rng) -> the fields of a sample, and whether a text was cut; raises TextError
Build = Callable[[Example, np.random.Generator], tuple[Sample, bool]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What an editor is trained for: samples, and what the scorer is asked about them.

    Attributes:
      source: of the samples.
      edit_weights: share of each edit type, in any unit; exact over a stretch of steps.
      templates: of the questions.
      prefix: what instructions begin with, for the student alone.
      weight: share of the samples among all tasks, in any unit.
    """

    source: Source
    edit_weights: Mapping[str, float]
    templates: questions_lib.Templates
    prefix: str = ""
    weight: float = 1.0


def stage_dataset(stage: str, source: Any, feed: Feed, **options: Any) -> grain.MapDataset:
    """The batches of a stage; beside the fields that its function tells, each has `batches.NOTES` about its records.

    Args:
      source: a Source, for "npedit" Tasks by name, for "scorer" and "supervised" easy-VQA.
      options: those of the stage's function in this module.

    Raises:
      ValueError: unknown stage.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; choose one of {tuple(STAGES)}")
    return STAGES[stage](source, feed, **options)


def autoencoder(source: Source, feed: Feed, **pictures: float) -> grain.MapDataset:
    """{"image": uint8 [B, H, W, 3], "weight": float32 [B]}; options are those of the source's `pictures`."""

    def build(example, rng):
        del rng
        return {"image": example.image}, False

    return batches(_streams(source.pictures(**pictures), source, build), feed)


def base(
    source: Source, feed: Feed, *, text: TextTokenizer, caption_dropout: float = 0.1, **pictures: float
) -> grain.MapDataset:
    """{"image": uint8 [B, H, W, 3], "caption_ids": int32 [B, L], "caption_mask": bool [B, L], "weight": float32 [B]}.

    Args:
      caption_dropout: probability of the empty caption.
      pictures: options of the source's `pictures`.
    """
    build = functools.partial(_captioned, TextCache(text), "image", caption_dropout, 0.0)
    return batches(_streams(source.pictures(**pictures), source, build), feed)


def warmup(
    source: Source, feed: Feed, *, text: TextTokenizer, caption_dropout: float = 0.1, instruction_share: float = 0.0
) -> grain.MapDataset:
    """As `base`, with "reference" in the place of "image": images of the data alone, each with its own caption.

    Args:
      instruction_share: probability that an edit's instruction, where the sample has one, is the text instead. A
        student whose base was taught with instructions as well would follow some of them, and shall copy here.
    """
    build = functools.partial(_captioned, TextCache(text), "reference", caption_dropout, instruction_share)
    return batches(_streams(source.captioned(), source, build), feed)


def npedit(
    tasks: Mapping[str, Task],
    feed: Feed,
    *,
    text: TextTokenizer,
    scorer: ScorerTokenizer,
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
    float32 [B]; "edit_type": int32 [B], place in the source's `edit_types`; "negative_ids": int32 [1, L],
    "negative_mask": bool [1, L], of the whole batch}. With inner batches each has a leading T. Packed questions come as
    "packed_ids", "packed_positions", "packed_segments", "packed_image_index": int32 [B, packed_length] and
    "answer_place": int32 [B, 2] in the place of the three "question_" and "image_index" arrays.

    Args:
      tasks: by name; their sources have the same buckets.
      guidance: guidance scale of the real score by edit type.
      question_weights: of edit verification and identity; "nothing" is asked the identity question alone.
      negative_prompt: what the real score is guided away from.
      packed_length: tokens of the row that both questions are packed into; 0 gives each question a row of its own.

    Raises:
      ValueError: unknown edit type, or one without a guidance scale.
    """
    texts, prompts = TextCache(text), QuestionCache(scorer)

    def build(templates, prefix, edit_type, place, example, rng):
        del rng
        asked = questions_lib.edit_questions(
            templates, edit_type, instruction=example.instruction, object=example.object
        )
        nothing = edit_type == "nothing"
        instruction, cut = texts.fields("instruction", prefix + example.instruction)
        caption, caption_cut = texts.fields("caption", example.edited_caption)
        question, question_cut = prompts.fields(asked, len(asked), packed_length)
        fields = {
            "reference": example.image,
            **instruction,
            **caption,
            **question,
            "answer": np.array([item.answer for item in asked], np.int32),
            "question_weight": np.array((0.0 if nothing else question_weights[0], question_weights[1]), np.float32),
            "guidance": np.float32(guidance[edit_type]),
            "dmd_weight": np.float32(1.0),
            "identity_weight": np.float32(nothing),
            "edit_type": np.int32(place),
        }
        return fields, cut or caption_cut or question_cut

    streams = {}
    for name, task in tasks.items():
        _check_edit_types(task, guidance)
        total = sum(task.edit_weights.values()) or 1.0
        pools = task.source.edits({edit: weight / total for edit, weight in task.edit_weights.items()})
        for pool_name, pool in pools.items():
            # Workers are handed all this, and need nothing of the source itself.
            place = tuple(task.source.edit_types).index(pool.edit_type)
            made = functools.partial(build, task.templates, task.prefix, pool.edit_type, place)
            stream = _stream(pool, task.source, made)
            # The order of a single task does not depend on its name.
            streams[pool_name if len(tasks) == 1 else f"{name}/{pool_name}"] = dataclasses.replace(
                stream, weight=pool.weight * task.weight
            )
    leading = (feed.inner_batches, 1) if feed.inner_batches else (1,)
    negative = {
        key: np.broadcast_to(value, (*leading, *value.shape))
        for key, value in texts.fields("negative", negative_prompt)[0].items()
    }
    return batches(streams, feed).map(lambda batch: batch | negative)


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

    def sample(bucket, index, rng):
        del bucket
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
            **prompts.fields(asked, questions, packed_length)[0],
            "answer_ids": np.array([(answer_ids["No"], word) for word in words + words[:1] * pad], np.int32),
            "answer": np.array([question.answer for question in asked] + [0.0] * pad, np.float32),
            "question_weight": np.array([question.weight for question in example.questions] + [0.0] * pad, np.float32),
            batches_lib.NOTES: notes(f"easyvqa/{index}"),
        }

    return batches({"all": Stream(1.0, (len(data),), sample)}, feed)


def supervised(
    data: easyvqa.EasyVQA, feed: Feed, *, text: TextTokenizer, edit_weights: Mapping[str, float]
) -> grain.MapDataset:
    """Pairs made by pixel operations, for the upper bound that the editor's training is compared with.

    {"reference", "target": uint8 [B, H, W, 3], "instruction_ids": int32 [B, L], "instruction_mask": bool [B, L],
    "weight": float32 [B]}.

    Args:
      edit_weights: share of each edit type, in any unit.
    """
    texts = TextCache(text)

    def sample(edit_type, bucket, index, rng):
        del bucket
        edit = easyvqa.draw_edit(rng, data.shapes[index], edit_type)
        images = {"reference": data.images[index], "target": easyvqa_edits.apply(data.images[index], edit)}
        fields, cut = texts.fields("instruction", edit.instruction)
        return images | fields | {"weight": np.float32(1.0), batches_lib.NOTES: notes(f"easyvqa/{index}", cut=cut)}

    return batches(
        {name: Stream(weight, (len(data),), functools.partial(sample, name)) for name, weight in edit_weights.items()},
        feed,
    )


STAGES: Mapping[str, Callable[..., grain.MapDataset]] = {
    "autoencoder": autoencoder,
    "base": base,
    "warmup": warmup,
    "npedit": npedit,
    "scorer": scorer,
    "supervised": supervised,
}


def _check_edit_types(task: Task, guidance: Mapping[str, float]) -> None:
    known = task.source.edit_types
    unknown = [name for name in task.edit_weights if name not in known or name not in guidance]
    if unknown:
        raise ValueError(f"edit types {unknown} need a guidance scale and must be among {tuple(known)}")


def _captioned(
    captions: TextCache, image: str, dropout: float, instructed: float, example: Example, rng: np.random.Generator
) -> tuple[Sample, bool]:
    words = "" if rng.random() < dropout else example.input_caption
    if rng.random() < instructed:
        words = example.instruction or words
    fields, cut = captions.fields("caption", words)
    return {image: example.image, **fields}, cut


def _streams(pools: Mapping[str, Pool], source: Source, build: Build) -> dict[str, Stream]:
    return {name: _stream(pool, source, build) for name, pool in pools.items()}


def _stream(pool: Pool, source: Source, build: Build) -> Stream:
    return Stream(pool.weight, pool.sizes, functools.partial(_sample, pool, tuple(source.buckets), build))


def _sample(
    pool: Pool,
    buckets: Sequence[tuple[int, int]],
    build: Build,
    bucket: int,
    number: int,
    rng: np.random.Generator,
) -> Sample:
    """A sample of the pool, or where its record is bad one of weight 0 that says so."""
    id = ""
    try:
        example = pool.read(bucket, number, rng)
        id = example.id
        fields, cut = build(example, rng)
    except Unusable as error:
        told = notes(error.id, reason=error.reason, message=str(error))
    except TextError as error:
        told = notes(id, reason="text", message=str(error))
    else:
        return fields | {"weight": np.float32(1.0), batches_lib.NOTES: notes(id, cut=cut)}
    blank = Example(np.zeros((*buckets[bucket], 3), np.uint8), edit_types.DO_NOTHING[0], "", "", "", "")
    return build(blank, rng)[0] | {"weight": np.float32(0.0), batches_lib.NOTES: told}
