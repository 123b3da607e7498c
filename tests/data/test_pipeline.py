"""Tests of the batches: what they hold, in which order, what they never hold, and that a restart continues exactly."""

import collections
import copy
import dataclasses
import itertools
import pathlib
import runpy

import numpy as np
import pytest

from npedit_jax.data import batches, easyvqa, easyvqa_edits, pipeline, questions, scorer_pairs, tokenize
from npedit_jax.data.batches import Feed, Reading
from npedit_jax.data.easyvqa_source import EasyVQASource
from npedit_jax.training import datasets, networks, steps

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "easyvqa"
LENGTH, IMAGE_TOKENS, PROMPT = 16, 4, 64
EDIT_WEIGHTS = {"recolor": 0.33, "remove": 0.33, "replace": 0.33, "nothing": 0.01}
GUIDANCE = {"recolor": 1.5, "remove": 2.0, "replace": 2.5, "nothing": 1.0}


@dataclasses.dataclass(frozen=True)
class Example:
    images: tuple[np.ndarray, np.ndarray]
    questions: list[scorer_pairs.Asked]


@pytest.fixture(scope="module")
def data():
    return easyvqa.load("train")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    tokenize.build_easyvqa_tokenizers(directory)
    return (
        tokenize.TextTokenizer(directory / "text", LENGTH),
        tokenize.ScorerTokenizer(directory / "scorer", IMAGE_TOKENS, PROMPT),
    )


@pytest.fixture(scope="module")
def make(data, tokenizers):
    """Makes a stage's dataset with sensible options."""
    text, scorer = tokenizers

    def pairs(index, rng):
        other = int(rng.integers(len(data)))
        asked = [
            scorer_pairs.Asked("vqa", "is there a circle?", rng.random()),
            scorer_pairs.Asked("vqa", "what color is the circle?", 1.0, "red"),
        ]
        return Example((data.images[index], data.images[other]), asked[: 1 + index % 2])

    options = {
        "autoencoder": dict(plain_share=0.1, redraw=0.3, flip=0.5),
        "base": dict(text=text, caption_dropout=0.1, plain_share=0.1, redraw=0.3, flip=0.5),
        "warmup": dict(text=text, caption_dropout=0.1),
        "npedit": dict(
            text=text, scorer=scorer, templates=questions.EASYVQA, edit_weights=EDIT_WEIGHTS, guidance=GUIDANCE
        ),
        "scorer": dict(tokenizer=scorer, templates=questions.EASYVQA, questions=3, pairs=pairs),
        "supervised": dict(text=text, edit_weights=EDIT_WEIGHTS),
    }

    def build(stage, feed=None, *, fraction=1.0, notes=False, **changes):
        chosen, given = data.fraction(fraction), options[stage] | changes
        if stage in ("scorer", "supervised"):
            source = chosen
        elif stage == "npedit":
            source = EasyVQASource(chosen)
            source = {"": pipeline.Task(source, given.pop("edit_weights"), given.pop("templates"))}
        else:
            source = EasyVQASource(chosen)
        dataset = pipeline.stage_dataset(stage, source, feed or Feed(0, 8), **given)
        return dataset if notes else dataset.map(batches.arrays)

    return build


def same(a, b):
    return a.keys() == b.keys() and all((a[key] == b[key]).all() and a[key].dtype == b[key].dtype for key in a)


def image_numbers(data, images):
    """The number of each image in the split; KeyError for an image that is not of the split, byte for byte."""
    numbers = {image.tobytes(): number for number, image in enumerate(data.images)}
    return [numbers[np.ascontiguousarray(image).tobytes()] for image in images]


B, H, L, Q, S = 8, 64, LENGTH, 2, PROMPT
TEXT = lambda name: {f"{name}_ids": ("int32", (B, L)), f"{name}_mask": ("bool", (B, L))}  # noqa: E731
ASKED = lambda q: {  # noqa: E731
    "question_ids": ("int32", (B, q, S)),
    "question_mask": ("bool", (B, q, S)),
    "image_index": ("int32", (B, q, S)),
    "question_weight": ("float32", (B, q)),
}
WEIGHT = {"weight": ("float32", (B,))}
SPECS = {
    "autoencoder": {"image": ("uint8", (B, H, H, 3)), **WEIGHT},
    "base": {"image": ("uint8", (B, H, H, 3)), **WEIGHT, **TEXT("caption")},
    "warmup": {"reference": ("uint8", (B, H, H, 3)), **WEIGHT, **TEXT("caption")},
    "npedit": {
        "reference": ("uint8", (B, H, H, 3)),
        **TEXT("instruction"),
        **TEXT("caption"),
        **ASKED(Q),
        "answer": ("int32", (B, Q)),
        **{name: ("float32", (B,)) for name in ("guidance", "dmd_weight", "identity_weight", "weight")},
        "edit_type": ("int32", (B,)),
        "negative_ids": ("int32", (1, L)),
        "negative_mask": ("bool", (1, L)),
    },
    "scorer": {
        "images": ("uint8", (B, 2, H, H, 3)),
        **ASKED(3),
        "answer_ids": ("int32", (B, 3, 2)),
        "answer": ("float32", (B, 3)),
    },
    "supervised": {
        **{name: ("uint8", (B, H, H, 3)) for name in ("reference", "target")},
        **WEIGHT,
        **TEXT("instruction"),
    },
}


@pytest.mark.parametrize("stage", SPECS)
def test_keys_types_and_shapes(make, stage):
    dataset = make(stage)
    for batch in (dataset[0], dataset[1000]):
        assert {key: (str(value.dtype), value.shape) for key, value in batch.items()} == SPECS[stage]


@pytest.mark.parametrize("stage", SPECS)
def test_batch_is_the_same_however_reached(make, stage):
    once, again = make(stage), make(stage)
    again[7], again[3]
    iterated = list(itertools.islice(batches.iterate(make(stage, notes=True), Reading(threads=3)), 6))
    for number in (5, 0, 3):
        assert same(once[number], again[number]) and same(once[number], iterated[number])
    assert not same(once[0], once[1])
    assert not same(once[0], make(stage, Feed(1, 8))[0])


@pytest.mark.parametrize("stage", ["base", "npedit"])
def test_iterator_continues_from_its_state(make, stage):
    whole = list(itertools.islice(batches.iterate(make(stage, notes=True)), 9))
    first = batches.iterate(make(stage, notes=True), Reading(threads=2))
    for _ in range(4):
        next(first)
    state = first.get_state()
    second = batches.iterate(make(stage, notes=True), Reading(buffer=1))
    second.set_state(state)
    for batch in whole[4:]:
        assert same(next(second), batch)


@pytest.mark.parametrize("stage", ["warmup", "npedit"])
def test_no_edited_image_can_reach_the_student(make, data, stage):
    dataset = make(stage, Feed(3, 64))
    for number in (0, 1, 17, 62, 63, 500):  # 62 and 63 lie around the end of the first epoch
        batch = dataset[number]
        # The one image in the batch is the reference, and it is an image of the train split, byte for byte.
        assert [key for key, value in batch.items() if value.dtype == np.uint8 or value.ndim > 3] == ["reference"]
        image_numbers(data, batch["reference"])


@pytest.mark.parametrize("stage", ["warmup", "npedit"])
def test_nor_can_one_by_the_configs_of_the_small_experiment(data, stage):
    """Batches as a run of the config makes them: a picture of the train split a sample, and numbers and texts."""
    config = runpy.run_path(str(CONFIGS / f"{stage}.py"))["get_config"]()
    modules = {}
    if stage == "npedit":
        modules["scorer"] = networks.module_of(config.networks.scorer)
    batch = batches.arrays(datasets.build(config, modules)[3])
    pixels = {key for key, value in batch.items() if value.size >= batch["reference"].size / 3}  # however it is shaped
    assert pixels == {"reference"} and batch["reference"].dtype == np.uint8
    image_numbers(data, batch["reference"].reshape(-1, 64, 64, 3))
    texts = {f"{name}_{part}" for name in ("caption", "instruction", "negative") for part in ("ids", "mask")}
    questions = {"question_ids", "question_mask", "image_index", "answer", "question_weight"}
    numbers = {"edit_type", "weight", "guidance", "dmd_weight", "identity_weight"}
    assert batch.keys() <= {"reference"} | texts | questions | numbers, sorted(batch)


def test_an_epoch_of_a_stream_shows_every_image_once(make, data):
    dataset = make("npedit", edit_weights={"recolor": 1, "remove": 1}, fraction=0.01)  # 40 images, 10 steps for both
    epochs = []
    for epoch in range(3):
        batches = [dataset[10 * epoch + step] for step in range(10)]
        types = np.concatenate([batch["edit_type"] for batch in batches])
        numbers = np.array(image_numbers(data, np.concatenate([batch["reference"] for batch in batches])))
        for edit_type in (0, 1):
            epochs.append(numbers[types == edit_type].tolist())
            assert sorted(epochs[-1]) == list(range(40))
    assert len(set(map(tuple, epochs))) == 6  # every epoch of every stream has an order of its own


def test_edit_types_are_exact_over_every_hundred_samples(make):
    dataset = make("npedit", Feed(0, 20))
    for start in (0, 5, 35):
        types = np.concatenate([dataset[step]["edit_type"] for step in range(start, start + 5)])
        counts = collections.Counter(easyvqa.EDIT_TYPES[number] for number in types.tolist())
        assert counts == {"recolor": 33, "remove": 33, "replace": 33, "nothing": 1}
    mixed = [set(dataset[step]["edit_type"].tolist()) for step in range(5)]
    assert all(len(types) >= 3 for types in mixed)


def test_npedit_samples_hang_together(make, data, tokenizers):
    text, scorer = tokenizers
    words = text._tokenizer
    for step in range(5):
        batch = make("npedit", Feed(0, 20))[step]
        for row, number in enumerate(image_numbers(data, batch["reference"])):
            source, edit_type = data.shapes[number], easyvqa.EDIT_TYPES[batch["edit_type"][row]]
            instruction, caption = (
                words.decode(batch[f"{name}_ids"][row][batch[f"{name}_mask"][row]].tolist())
                for name in ("instruction", "caption")
            )
            question = scorer._tokenizer.decode(batch["question_ids"][row, 0][batch["question_mask"][row, 0]].tolist())
            assert batch["guidance"][row] == GUIDANCE[edit_type]
            assert batch["identity_weight"][row] == (edit_type == "nothing")
            assert batch["question_weight"][row].tolist() == [float(edit_type != "nothing"), 1.0]
            assert batch["answer"][row].tolist() == ([0, 1] if edit_type == "remove" else [1, 1])
            rows, first = batch["image_index"][row, 0], IMAGE_TOKENS if edit_type == "remove" else 0
            assert rows[rows >= 0].tolist() == list(range(first, 2 * IMAGE_TOKENS))
            if edit_type == "remove":
                assert caption == "a plain background"
                assert f"is there a {source.kind} or another shape in the image" in question
                continue
            assert instruction.replace(" .", "") in question
            color = next(word for word in easyvqa.COLORS if word in caption)
            kind = next(word for word in easyvqa.CLASSES if word in caption)
            assert (color != source.color) == (edit_type == "recolor")
            assert (kind != source.kind) == (edit_type == "replace")
            if edit_type == "recolor":
                assert instruction.split()[-1] == color
            elif edit_type == "replace":
                assert instruction.split()[-1] == kind


def test_inner_batches_are_the_plain_batches_in_order(make):
    plain, inner = make("npedit", Feed(0, 4)), make("npedit", Feed(0, 4, inner_batches=3))
    for step in (0, 5):
        stacked = [plain[3 * step + number] for number in range(3)]
        assert same(inner[step], {key: np.stack([batch[key] for batch in stacked]) for key in stacked[0]})
    assert inner[0]["negative_ids"].shape == (3, 1, LENGTH)


@pytest.mark.parametrize("inner_batches", [0, 3])
def test_hosts_share_one_global_order(make, data, inner_batches):
    axis = 1 if inner_batches else 0
    single = make("npedit", Feed(0, 8, inner_batches=inner_batches))
    hosts = [make("npedit", Feed(0, 4, places=(number,), of=2, inner_batches=inner_batches)) for number in range(2)]
    for step in (0, 9):
        whole = np.concatenate([host[step]["reference"] for host in hosts], axis=axis)
        np.testing.assert_array_equal(whole, single[step]["reference"])


def test_base_pictures_fit_their_captions(make, data, tokenizers):
    text, _ = tokenizers
    batch = make("base", Feed(0, 200), caption_dropout=0.2)[0]
    ids, counts = batch["caption_ids"], collections.Counter()
    for image, caption_ids, mask in zip(batch["image"], ids, batch["caption_mask"], strict=True):
        caption = text._tokenizer.decode(caption_ids[mask].tolist())
        ground = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
        shape = image[np.linalg.norm(image - ground, axis=-1) > 60]
        counts["plain"] += not len(shape)
        counts["empty"] += caption == ""
        if caption == "":
            continue
        assert (caption == "a plain background") == (not len(shape))
        if len(shape):
            nearest = min(
                easyvqa.PALETTE, key=lambda name: np.linalg.norm(easyvqa.PALETTE[name] - np.median(shape, axis=0))
            )
            assert nearest in caption.split()
    assert counts["plain"] == 20 and 25 <= counts["empty"] <= 60


def test_the_warm_up_copies_under_instructions_as_well(make, data, tokenizers):
    batch = make("warmup", Feed(0, 400), caption_dropout=0.1, instruction_share=0.4)[0]
    numbers, kinds = image_numbers(data, batch["reference"]), collections.Counter()
    for number, ids, mask in zip(numbers, batch["caption_ids"], batch["caption_mask"], strict=True):
        words, shape = tokenizers[0]._tokenizer.decode(ids[mask].tolist()).split(), data.shapes[number]
        captioned = set(words) & set(easyvqa.COLORS) == {shape.color} and shape.kind in words
        kinds["empty" if not words else "caption" if captioned and words[0] == "a" else "instruction"] += 1
    assert 20 <= kinds["empty"] <= 60 and 120 <= kinds["instruction"] <= 220, kinds
    alone = make("warmup", Feed(0, 400), caption_dropout=0.1)[0]
    assert not {"make", "remove", "replace"} & {
        word
        for ids, mask in zip(alone["caption_ids"], alone["caption_mask"], strict=True)
        for word in tokenizers[0]._tokenizer.decode(ids[mask].tolist()).split()
    }


def test_flips_and_redrawn_pictures(make, data):
    batch = make("autoencoder", Feed(0, 64), plain_share=0.0, redraw=0.0, flip=0.0)[0]
    image_numbers(data, batch["image"])
    mirrored = make("autoencoder", Feed(0, 64), plain_share=0.0, redraw=0.0, flip=1.0)[0]
    assert (mirrored["image"] == batch["image"][:, :, ::-1]).all()
    redrawn = make("autoencoder", Feed(0, 64), plain_share=0.0, redraw=1.0, flip=0.0)[0]
    assert (redrawn["image"] != batch["image"]).any(axis=(1, 2, 3)).all()


def test_scorer_pads_missing_questions_with_weight_zero(make, data, tokenizers):
    batch = make("scorer")[0]
    for row, (images, weights) in enumerate(zip(batch["images"], batch["question_weight"], strict=True)):
        count = 1 + image_numbers(data, images[:1])[0] % 2
        assert weights.tolist() == [1.0] * count + [0.0] * (3 - count)
        assert (batch["question_ids"][row, count:] == batch["question_ids"][row, :1]).all()
        assert batch["question_mask"][row].any(-1).all()
        words = [tokenizers[1].answer_id(word) for word in ("Yes", "red", "Yes")]
        wanted = words if count == 2 else words[:1] * 3
        assert batch["answer_ids"][row].tolist() == [[tokenizers[1].answer_id("No"), word] for word in wanted]
    assert len(set(batch["answer"][:, 0].tolist())) == 8
    with pytest.raises(ValueError, match="room for 1"):
        dataset = make("scorer", questions=1)
        [dataset[step] for step in range(3)]


def test_packed_scorer_rows_hold_the_same_questions(make):
    apart, packed = make("scorer")[0], make("scorer", packed_length=2 * PROMPT)[0]
    assert set(apart) - set(packed) == set(steps.UNPACKED) and set(packed) - set(apart) == set(steps.PACKED)
    for row, weights in enumerate(apart["question_weight"]):
        for place in range(3):
            last = apart["question_ids"][row, place][apart["question_mask"][row, place]]
            length, end = len(last), packed["answer_place"][row, place] + 1
            segments = packed["packed_segments"][row]
            own = (segments == segments[end - 1]).sum()
            assert packed["packed_ids"][row, end - own : end].tolist() == last[length - own :].tolist()
        assert (packed["answer_place"][row, weights == 0] == packed["answer_place"][row, 0]).all()


def test_question_weights_and_negative_prompt(make, tokenizers):
    batch = make("npedit", question_weights=(1.0, 0.0), negative_prompt="a plain background")[0]
    assert (batch["question_weight"][:, 1] == 0).all()
    assert (batch["negative_ids"] == tokenizers[0](["a plain background"]).ids).all()


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("npedit", {"edit_weights": {"recolour": 1.0}}, "recolour"),
        ("npedit", {"guidance": {"recolor": 1.0}}, "remove"),
        ("npedit", {"edit_weights": {"recolor": 0.0}}, "no stream"),
        ("npedit", {"negative_prompt": "ugly"}, "unknown words: ugly"),
    ],
)
def test_wrong_options(make, stage, changes, message):
    with pytest.raises(ValueError, match=message):
        make(stage, **changes)


def test_unknown_stage(data):
    with pytest.raises(ValueError, match="unknown stage 'finetune'"):
        pipeline.stage_dataset("finetune", data, Feed(0, 8))


def test_cut_texts_and_questions_are_counted(tokenizers, make):
    # Shorter than any caption, longer than the empty one.
    short = copy.copy(tokenizers[0])
    short.length = 3
    iterator = batches.iterate(make("warmup", text=short, caption_dropout=0.5, notes=True))
    batch = next(iterator)
    empty = batch["caption_mask"].sum(axis=-1) == 1
    assert 0 < iterator.counts["cut"] == (~empty).sum() < 8 and iterator.counts["samples"] == 8
    assert iterator.counts["bad"] == 0 and (batch["weight"] == 1).all()


def test_supervised_targets_are_the_edits_done_by_hand(make, data):
    batch = make("supervised", edit_weights={"remove": 1.0})[0]
    numbers = image_numbers(data, batch["reference"])
    expected = np.stack([easyvqa_edits.remove(data.images[number]) for number in numbers])
    np.testing.assert_array_equal(batch["target"], expected)
