"""What each stage trains on: Grain datasets of ready batches, whose order is a pure function of the seed.

A `grain.MapDataset` of batches holds batch k under index k, however it is reached. Images go through each stream in an
order shuffled anew every epoch; streams (one per edit type, say) are interleaved in exact proportions; everything that
is drawn for a sample comes from the seed, the stream and the sample's place in it.

Shapes: B batch, H height, W width, L text tokens, Q questions per sample, S tokens of a question's prompt, T inner
batches.
"""

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from npedit_jax.data import easyvqa, easyvqa_edits
from npedit_jax.data import questions as questions_lib
from npedit_jax.data.tokenize import QuestionTokens, ScorerTokenizer, TextTokenizer

Sample = dict[str, Any]
Draw = Callable[[int, np.random.Generator], Sample]  # (image number, rng) -> one sample
Pairs = Callable[[int, np.random.Generator], Any]  # (image number, rng) -> images and questions about them


@dataclasses.dataclass(frozen=True)
class Feed:
    """How samples become batches.

    Attributes:
      seed: of the order and of everything drawn.
      batch_size: samples in a batch of this host, B.
      host: this host's number and the number of hosts; together they consume one global order.
      inner_batches: T: batches are [T, B, ...]; 0 for plain batches [B, ...].
    """

    seed: int
    batch_size: int
    host: tuple[int, int] = (0, 1)
    inner_batches: int = 0


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


def iterate(dataset: grain.MapDataset, *, threads: int = 1, buffer: int = 4) -> grain.DatasetIterator:
    """Iterates from batch 0, `threads` preparing up to `buffer` batches ahead; has get_state and set_state."""
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)))


def autoencoder(
    data: easyvqa.EasyVQA, feed: Feed, *, plain_share: float = 0.0, redraw: float = 0.0, flip: float = 0.0
) -> grain.MapDataset:
    """{"image": uint8 [B, H, W, 3]}; options as in `base`."""

    def sample(draw, index, rng):
        return {"image": draw(data, index, rng)[0]}

    return _batches(_picture_streams(sample, plain_share, redraw=redraw, flip=flip), len(data), feed)


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

    return _batches(_picture_streams(sample, plain_share, redraw=redraw, flip=flip), len(data), feed)


def warmup(data: easyvqa.EasyVQA, feed: Feed, *, text: TextTokenizer, caption_dropout: float = 0.1) -> grain.MapDataset:
    """{"reference": uint8 [B, H, W, 3], "caption_ids": int32 [B, L], "caption_mask": bool [B, L]}: its own caption."""
    captions = TextCache(text)

    def sample(index, rng):
        caption = _drop(easyvqa.caption(data.shapes[index], rng), caption_dropout, rng)
        return {"reference": data.images[index]} | captions.fields("caption", caption)

    return _batches({"all": (1.0, sample)}, len(data), feed)


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
) -> grain.MapDataset:
    """Reference images with instructions, edited captions and questions: never an edited image.

    {"reference": uint8 [B, H, W, 3]; "instruction_ids", "caption_ids": int32 [B, L], and their "_mask": bool [B, L],
    the caption being that of the edited image; "question_ids", "image_index": int32 [B, 2, S], "question_mask":
    bool [B, 2, S], "answer": int32 [B, 2] (1 yes, 0 no), "question_weight": float32 [B, 2], all of edit verification,
    then identity; "guidance", "dmd_weight", "identity_weight" (1 on "nothing"), "weight" (0 on a bad record):
    float32 [B]; "edit_type": int32 [B], index into easyvqa.EDIT_TYPES; "negative_ids": int32 [1, L], "negative_mask":
    bool [1, L], of the whole batch}. With inner batches each has a leading T.

    Args:
      edit_weights: share of each edit type, in any unit; exact over a stretch of steps.
      guidance: guidance scale of the real score by edit type.
      question_weights: of edit verification and identity; "nothing" is asked the identity question alone.
      negative_prompt: what the real score is guided away from.

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
            **prompts.fields(asked),
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
    return _batches(streams, len(data), feed).map(lambda batch: batch | negative)


def scorer(
    data: easyvqa.EasyVQA,
    feed: Feed,
    *,
    tokenizer: ScorerTokenizer,
    templates: questions_lib.Templates,
    questions: int,
    pairs: Pairs,
) -> grain.MapDataset:
    """Image pairs and questions about them, the answers as probabilities of Yes.

    {"images": uint8 [B, 2, H, W, 3], "question_ids", "image_index": int32 [B, Q, S], "question_mask": bool [B, Q, S],
    "answer", "question_weight": float32 [B, Q]}; where a pair has fewer than Q questions, the rest repeats the first
    one at weight 0.

    Args:
      templates: say which images each kind of question shows.
      questions: Q, the most questions that a pair comes with.
      pairs: (image number, rng) -> an example with `images` and `questions`, (kind, text, probability of Yes) each.
    """
    prompts = QuestionCache(tokenizer)

    def sample(index, rng):
        example = pairs(index, rng)
        if len(example.questions) > questions:
            raise ValueError(
                f"a pair came with {len(example.questions)} questions and the batch has room for {questions}; raise it"
            )
        asked = [
            questions_lib.Question(kind, text, templates[kind].images, answer)
            for kind, text, answer in example.questions
        ]
        pad = questions - len(asked)
        return {
            "images": np.stack(example.images),
            **prompts.fields(asked + asked[:1] * pad),
            "answer": np.array([question.answer for question in asked] + [0.0] * pad, np.float32),
            "question_weight": np.array([1.0] * len(asked) + [0.0] * pad, np.float32),
        }

    return _batches({"all": (1.0, sample)}, len(data), feed)


STAGES: Mapping[str, Callable[..., grain.MapDataset]] = {
    "autoencoder": autoencoder,
    "base": base,
    "warmup": warmup,
    "npedit": npedit,
    "scorer": scorer,
}


class TextCache(dict):
    """Tokens of texts, each tokenized once: text -> (ids int32 [L], mask bool [L])."""

    def __init__(self, tokenizer: TextTokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, mask, cut = self._tokenizer([text])
        if cut[0]:
            raise ValueError(f"a text does not fit in {self._tokenizer.length} tokens, raise the text length: {text!r}")
        self[text] = ids[0], mask[0]
        return self[text]

    def fields(self, name: str, text: str) -> Sample:
        """The text's ids and mask under `name`_ids and `name`_mask."""
        ids, mask = self[text]
        return {f"{name}_ids": ids, f"{name}_mask": mask}


class QuestionCache(dict):
    """Prompts of questions, each tokenized once: (text, images) -> its row of QuestionTokens."""

    def __init__(self, tokenizer: ScorerTokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, key: tuple[str, tuple[int, ...]]) -> QuestionTokens:
        text, images = key
        tokens = self._tokenizer([questions_lib.Question("", text, images, 1.0)])
        if tokens.cut[0]:
            raise ValueError(
                f"a question does not fit in {self._tokenizer.length} tokens, raise the question length: {text!r}"
            )
        self[key] = QuestionTokens(*(field[0] for field in tokens))
        return self[key]

    def fields(self, asked: Sequence[questions_lib.Question]) -> Sample:
        """The prompts' ids, masks and image rows, each [Q, S]."""
        rows = [self[question.text, question.images] for question in asked]
        ids, mask, image_index, _ = (np.stack(field) for field in zip(*rows, strict=True))
        return {"question_ids": ids, "question_mask": mask, "image_index": image_index}


class Interleave(grain.transforms.DatasetSelectionMap):
    """Which stream, and which of its samples, stands at each place: exact shares over every period.

    Shares are rounded to thousandths, so a period has at most about a thousand places. Each period has an order of its
    own: in a fixed one, the same part of every step's batch could miss a stream for ever.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        shares = [max(1, round(1000 * weight / sum(weights))) for weight in weights]
        self._counts = [share // math.gcd(*shares) for share in shares]
        self._seed = seed
        self._order = functools.lru_cache(maxsize=16)(self._draw_order)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        period, place = divmod(index, sum(self._counts))
        stream, rank = self._order(period)[place]
        return stream, period * self._counts[stream] + rank

    def _draw_order(self, period: int) -> list[tuple[int, int]]:
        """(stream, rank within the period's samples of that stream) at each place of a period."""
        streams = np.repeat(np.arange(len(self._counts)), self._counts)
        streams = np.random.default_rng([self._seed, period]).permutation(streams).tolist()
        ranks = [iter(range(count)) for count in self._counts]
        return [(stream, next(ranks[stream])) for stream in streams]


def _batches(streams: Mapping[str, tuple[float, Draw]], images: int, feed: Feed) -> grain.MapDataset:
    """Batches from streams, name -> (weight, draw), each going through all images in an order of its own."""
    streams = {name: stream for name, stream in sorted(streams.items()) if stream[0] > 0}
    if not streams:
        raise ValueError("no stream has a weight above 0; give at least one")
    parts = [
        grain.MapDataset.range(images).seed(_stream_seed(feed.seed, name)).shuffle().repeat().random_map(draw)
        for name, (_, draw) in streams.items()
    ]
    order = Interleave([weight for weight, _ in streams.values()], feed.seed)
    mixed = grain.MapDataset.select_from_datasets(parts, order)
    number, hosts = feed.host
    inner = max(1, feed.inner_batches)
    leading = (inner, feed.batch_size) if feed.inner_batches else (feed.batch_size,)
    stack = functools.partial(_stack, leading=leading)
    return mixed[number::hosts].batch(inner * feed.batch_size, drop_remainder=True, batch_fn=stack)


def _stack(samples: Sequence[Sample], leading: tuple[int, ...]) -> Sample:
    stacked = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return {key: value.reshape(*leading, *value.shape[1:]) for key, value in stacked.items()}


def _stream_seed(seed: int, name: str) -> int:
    """A seed of its own for each stream, so that streams do not go through the images in step."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


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
