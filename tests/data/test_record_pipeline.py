"""Batches of records: what a step reads, in which order, on how many hosts, after which interruption."""

import collections
import dataclasses
import itertools
import logging

import numpy as np
import pytest

from npedit_jax.data import batches, edit_types, images, pipeline, questions, records
from npedit_jax.data.batches import Feed, Reading
from npedit_jax.data.sources import _SIDED, RecordSource, Unusable
from tests.data import record_sets
from tests.data.record_sets import BUCKETS, edits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return record_sets.photograph_records(120)


@pytest.fixture(scope="module")
def found(made, tmp_path_factory):
    return record_sets.write(tmp_path_factory.mktemp("records") / "photographs", made)


def ids_of(batch):
    return batch[batches.NOTES]["id"]


def words(tokenizer, ids, mask):
    return tokenizer._tokenizer.decode(ids[mask].tolist())


def test_fields_are_those_of_the_edit_step(found):
    length = record_sets.QUESTION_LENGTH
    text = lambda name, lead: {  # noqa: E731
        f"{name}_ids": ("int32", (*lead, record_sets.TEXT_LENGTH)),
        f"{name}_mask": ("bool", (*lead, record_sets.TEXT_LENGTH)),
    }
    number = lambda dtype: (dtype, (2, 6))  # noqa: E731
    dataset = edits(found, Feed(0, 6, inner_batches=2))
    shapes = set()
    for step in range(12):
        batch = batches.arrays(dataset[step])
        height, width = batch["reference"].shape[2:4]
        shapes.add((height, width))
        assert {key: (str(value.dtype), value.shape) for key, value in batch.items()} == {
            "reference": ("uint8", (2, 6, height, width, 3)),
            **text("instruction", (2, 6)),
            **text("caption", (2, 6)),
            **text("negative", (2, 1)),
            "question_ids": ("int32", (2, 6, 2, length)),
            "question_mask": ("bool", (2, 6, 2, length)),
            "image_index": ("int32", (2, 6, 2, length)),
            "answer": ("int32", (2, 6, 2)),
            "question_weight": ("float32", (2, 6, 2)),
            **{name: number("float32") for name in ("guidance", "dmd_weight", "identity_weight", "weight")},
            "edit_type": number("int32"),
        }
    assert shapes == set(BUCKETS)


def test_a_sample_is_its_record(found, made):
    by_id = {f"photographs/{record.id}": record for record in made}
    tools = record_sets.tokenizers()
    dataset, seen = edits(found, Feed(0, 8)), collections.Counter()
    for step in range(20):
        batch = dataset[step]
        for row, id in enumerate(ids_of(batch)):
            record, edit_type = by_id[id], RecordSource.edit_types[batch["edit_type"][row]]
            seen[edit_type] += 1
            size = batch["reference"].shape[1:3]
            np.testing.assert_array_equal(batch["reference"][row], images.decode(record.image, size))
            said = {
                name: words(tools["text"], batch[f"{name}_ids"][row], batch[f"{name}_mask"][row])
                for name in ("instruction", "caption")
            }
            asked = [
                words(tools["scorer"], batch["question_ids"][row, q], batch["question_mask"][row, q]) for q in (0, 1)
            ]
            assert batch["guidance"][row] == record_sets.GUIDANCE[edit_type]
            if edit_type == "nothing":
                assert any(text in said["instruction"] for text in edit_types.DO_NOTHING)
                assert record.input_caption in said["caption"] and "after" not in said["caption"]
                assert batch["question_weight"][row].tolist() == [0, 1] and batch["identity_weight"][row] == 1
                continue
            assert edit_type == record.edit_type
            assert record.instruction in said["instruction"] and record.edited_caption in said["caption"]
            assert batch["question_weight"][row].tolist() == [1, 1] and batch["identity_weight"][row] == 0
            assert batch["answer"][row].tolist() == [int(edit_type != "remove"), 1]
            assert (record.object if edit_type == "remove" else record.instruction) in asked[0]
    assert set(seen) == {"remove", "style", "nothing"}


def test_every_host_has_the_bucket_of_the_step_and_its_slice_of_the_order(found):
    single = edits(found, Feed(3, 8, inner_batches=2))
    hosts = [edits(found, Feed(3, 2, places=(number,), of=4, inner_batches=2)) for number in range(4)]
    for step in (0, 1, 7, 1234):
        parts = [host[step] for host in hosts]
        assert len({part["reference"].shape for part in parts}) == 1
        together = np.concatenate([ids_of(part) for part in parts], axis=-1)
        assert (together == ids_of(single[step])).all()


def test_edit_types_have_their_shares_and_scarce_ones_repeat_only_after_all(found, made):
    dataset = edits(found, Feed(0, 4), weights={"remove": 0.25, "style": 0.75})
    order = np.concatenate([ids_of(dataset[step]) for step in range(250)])  # one period
    kind = {f"photographs/{record.id}": record.edit_type for record in made}
    assert collections.Counter(kind[id] for id in order) == {"remove": 250, "style": 750}
    sizes = {f"photographs/{record.id}": (record.height, record.width) for record in made}
    for edit_type, size in itertools.product(("remove", "style"), record_sets.SIZES.values()):
        own = [id for id in order if kind[id] == edit_type and sizes[id] == size]
        epoch = len(set(own))
        assert epoch == 20
        for start in range(0, len(own) - epoch + 1, epoch):
            assert len(set(own[start : start + epoch])) == epoch


HALVES = {"remove": 0.5, "style": 0.5}


@pytest.fixture(scope="module")
def uninterrupted(found):
    """Ids of 45 steps of 8 samples: three epochs of 120 records."""
    return [ids_of(edits(found, Feed(7, 8), weights=HALVES)[step]) for step in range(45)]


@pytest.mark.parametrize("hosts, then", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_interrupted_at_a_random_step_no_record_is_lost_or_repeated(found, uninterrupted, hosts, then):
    """Three epochs of every stream, uninterrupted on one host and interrupted on one or two."""
    whole, batch, steps, weights = uninterrupted, 8, len(uninterrupted), HALVES
    assert len(set(np.concatenate(whole).tolist())) == 120
    stop = int(np.random.default_rng([hosts, then]).integers(1, steps))
    seen, states = [[] for _ in range(steps)], []
    for number in range(hosts):
        iterator = _watched(found, Feed(7, batch // hosts, (number,), hosts), weights)
        for step in range(stop):
            seen[step].append(next(iterator)["ids"])
        states.append(iterator.get_state())
    assert all(state == states[0] for state in states)
    for number in range(then):
        iterator = _watched(found, Feed(7, batch // then, (number,), then), weights)
        iterator.set_state(states[0])
        for step in range(stop, steps):
            seen[step].append(next(iterator)["ids"])
    for step in range(steps):
        assert np.concatenate(seen[step]).tolist() == whole[step].tolist()


def _with_ids(batch):
    return batch | {"ids": ids_of(batch)}


def _watched(found, feed, weights, reading=Reading(threads=2)):  # noqa: B008
    """An iterator whose batches hold the ids, which the step never sees."""
    return batches.iterate(edits(found, feed, weights=weights).map(_with_ids), reading)


def test_worker_processes_change_nothing(found):
    """A run goes on with two of them, and after that with none."""
    plain, workers = (
        _watched(found, Feed(0, 4), record_sets.WEIGHTS, reading)
        for reading in (Reading(), Reading(workers=2, buffer=1))
    )
    for _ in range(3):
        next(plain)
    workers.set_state(plain.get_state())
    for _ in range(5):
        a, b = next(plain), next(workers)
        assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)
    assert workers.counts == plain.counts
    plain.set_state(workers.get_state())
    dataset = edits(found, Feed(0, 4))
    for step in (8, 9):
        assert next(plain)["ids"].tolist() == next(workers)["ids"].tolist() == ids_of(dataset[step]).tolist()


def test_warm_up_and_base_show_images_with_their_own_captions(found, made):
    source = RecordSource({"photographs": found}, BUCKETS)
    text = record_sets.tokenizers()["text"]
    for make, name in ((pipeline.warmup, "reference"), (pipeline.base, "image")):
        batch = make(source, Feed(0, 8), text=text, caption_dropout=0.0)[3]
        for id, ids, mask in zip(ids_of(batch), batch["caption_ids"], batch["caption_mask"], strict=True):
            assert f"photograph {int(id.split('/')[1])}" in words(text, ids, mask)
        assert batch[name].shape[1:3] in BUCKETS and batch["weight"].tolist() == [1.0] * 8
    batch = pipeline.warmup(source, Feed(0, 8), text=text, caption_dropout=0.0, instruction_share=1.0)[3]
    for id, ids, mask in zip(ids_of(batch), batch["caption_ids"], batch["caption_mask"], strict=True):
        record = made[int(id.split("/")[1])]
        assert (record.instruction or record.input_caption) in words(text, ids, mask)


BAD = {
    3: ("empty", dict(image=b"")),
    10: ("unknown", dict(image=b"<html>not found</html>")),
    17: ("truncated", None),
    25: ("text", dict(instruction="remove the <IMG_CONTEXT>")),
}


@pytest.fixture(scope="module")
def damaged(made, tmp_path_factory):
    spoiled = list(made)
    for number, (_, changes) in BAD.items():
        record_sets.changed(spoiled, number, **(changes or {"image": spoiled[number].image[:-900]}))
    return record_sets.write(tmp_path_factory.mktemp("damaged"), spoiled)


def test_bad_records_keep_their_place_with_weight_zero(found, damaged, caplog):
    weights = {"remove": 0.5, "style": 0.5}
    good, bad = (edits(one, Feed(0, 8), weights=weights) for one in (found, damaged))
    reasons = {}
    for step in range(30):
        a, b = good[step], bad[step]
        told = b[batches.NOTES]
        for row, id in enumerate(ids_of(a)):
            assert told["id"][row] == id  # no stream shifts
            if told["reason"][row]:
                reasons[int(id.split("/")[1])] = str(told["reason"][row])
                assert b["weight"][row] == 0 and not b["reference"][row].any()
                assert b["instruction_mask"][row].any() and b["question_mask"][row].any(-1).all()
            else:
                assert b["weight"][row] == 1
                for key in ("reference", "instruction_ids", "question_ids"):
                    np.testing.assert_array_equal(a[key][row], b[key][row])
    assert reasons == {number: reason for number, (reason, _) in BAD.items()}
    iterator = batches.iterate(bad, Reading(max_bad_share=0.1))
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            next(iterator)
    assert iterator.counts["samples"] == 240 and iterator.counts["bad"] == sum(
        count for name, count in iterator.counts.items() if name.startswith("bad/")
    )
    assert {name for name in iterator.counts if name.startswith("bad/")} == {f"bad/{one}" for one, _ in BAD.values()}
    assert all(f"photographs/{number:04d}" in caplog.text for number in BAD)


def test_too_many_bad_records_end_the_run_with_the_count(damaged):
    iterator = batches.iterate(edits(damaged, Feed(0, 8)), Reading(max_bad_share=0.002))
    with pytest.raises(batches.TooManyBadRecords, match=r"3 of \d+ samples were bad: .*bad/"):
        for _ in range(200):
            next(iterator)
    resumed = batches.iterate(edits(damaged, Feed(0, 8)), Reading(max_bad_share=0.002))
    resumed.set_state(iterator.get_state())
    with pytest.raises(batches.TooManyBadRecords):  # the count is part of the state
        for _ in range(60):
            next(resumed)


def test_damaged_shards_are_bad_records(made, tmp_path):
    written = record_sets.write(tmp_path, made)
    (tmp_path / written.manifest["shards"][1]["file"]).unlink()
    dataset = edits(records.Records(tmp_path), Feed(0, 16), weights={"remove": 0.5, "style": 0.5})
    told = [dataset[step][batches.NOTES] for step in range(10)]
    reasons = np.concatenate([one["reason"] for one in told])
    assert set(reasons.tolist()) == {"", "unreadable"}
    named = np.concatenate([one["id"] for one in told])[reasons != ""]
    assert all(50 <= int(id.split("#")[1]) < 100 for id in named)  # of the second shard of fifty


def test_missing_texts_leave_a_record_out(made, tmp_path):
    partial = [dataclasses.replace(one, edited_caption="") if n % 2 else one for n, one in enumerate(made)]
    found = record_sets.write(tmp_path, partial)
    source = RecordSource({"photographs": found}, BUCKETS)
    pools = source.edits({"remove": 1.0, "nothing": 1.0})
    assert sum(pools["remove/photographs"].sizes) == 40 and sum(pools["nothing/photographs"].sizes) == 120
    with pytest.raises(ValueError, match="no record of edit type 'texture'.*instructions writes missing texts"):
        source.edits({"texture": 1.0})


def test_removals_without_an_object_are_never_trained_on(tmp_path):
    made = record_sets.photograph_records(12)
    for number in (1, 4):
        record_sets.changed(made, number, object="")  # a removal, and a style, which needs none
    found = record_sets.write(tmp_path, made)
    assert len(found.kept()) == 12  # the index may be older than objects in it
    source = RecordSource({"photographs": found}, BUCKETS)
    pools = source.edits({"remove": 0.5, "style": 0.4, "nothing": 0.1}) | source.captioned()
    seen = collections.Counter()
    for name, pool in pools.items():
        for bucket, size in enumerate(pool.sizes):
            for place in range(size):
                try:
                    pool.read(bucket, place, np.random.default_rng(0))
                    seen[name] += 1
                except Unusable as error:
                    seen[name, error.id, error.reason] += 1
    assert seen == {
        "remove/photographs": 5,
        ("remove/photographs", "photographs/0001", "no_object"): 1,
        "style/photographs": 6,
        "nothing/photographs": 12,
        "photographs": 12,
    }


def test_sets_are_mixed_by_weight_and_by_size(made, tmp_path):
    small = record_sets.write(tmp_path / "a", made[:30])
    large = record_sets.write(tmp_path / "b", made[30:])
    sets = {"small": small, "large": large}
    by_size = RecordSource(sets, BUCKETS).edits({"remove": 0.5, "style": 0.5})
    assert {name: pool.weight for name, pool in by_size.items()} == pytest.approx(
        {"remove/small": 0.125, "remove/large": 0.375, "style/small": 0.125, "style/large": 0.375}
    )
    by_weight = RecordSource(sets, BUCKETS, weights={"small": 3, "large": 1}).edits({"remove": 1.0})
    assert [pool.weight for pool in by_weight.values()] == [0.75, 0.25]
    with pytest.raises(ValueError, match="a weight for each"):
        RecordSource(sets, BUCKETS, weights={"small": 1})
    alone = RecordSource(sets, BUCKETS, weights={"small": 0, "large": 2}).edits({"remove": 1.0})
    assert {name: pool.weight for name, pool in alone.items()} == {"remove/large": 1.0}
    with pytest.raises(ValueError, match="no record of edit type 'remove'"):
        RecordSource(sets, BUCKETS, weights={"small": 0, "large": 0}).edits({"remove": 1.0})
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights of 0 or more; found {'small':"):
            RecordSource(sets, BUCKETS, weights={"small": wrong, "large": 1})


def test_fraction_of_the_images_is_the_same_in_every_run(found):
    chosen = [RecordSource({"one": found}, BUCKETS, fraction=0.5) for _ in range(2)]
    sizes = [source.edits({"remove": 1.0})["remove/one"].sizes for source in chosen]
    assert sizes[0] == sizes[1] and 15 < sum(sizes[0]) < 45
    with pytest.raises(ValueError, match="0 < fraction <= 1"):
        RecordSource({"one": found}, BUCKETS, fraction=0.0)


def test_flip_leaves_texts_that_tell_the_sides_apart(made, tmp_path):
    sided = list(made[:60])
    texts = {
        0: dict(instruction="remove the cat on the left"),
        1: dict(edited_caption="the rightmost chair is gone"),
        2: dict(input_caption='a shop called "Flora"'),
        9: dict(instruction="change the text on the sign"),
        10: dict(instruction="make it bright"),  # "right" is no word of it
        3: dict(object="the lamp at the left-hand side"),
        4: dict(input_caption="a café named ‘Flora’"),
        5: dict(instruction="turn the wheel anti-clockwise"),
        11: dict(instruction="style the man's hat, the dogs' bowl and the cats' sofa"),
    }
    for number, changes in texts.items():
        record_sets.changed(sided, number, **changes)
    found = record_sets.write(tmp_path, sided)
    weights = {"remove": 0.5, "style": 0.5}
    plain, flipped = (edits(found, Feed(0, 8), weights=weights, options=dict(flip=flip)) for flip in (0.0, 1.0))
    kept = set()
    for step in range(20):
        a, b = plain[step], flipped[step]
        for row, id in enumerate(ids_of(a)):
            same = (a["reference"][row] == b["reference"][row]).all()
            assert same or (a["reference"][row] == b["reference"][row][:, ::-1]).all()
            kept |= {int(id.split("/")[1])} if same else set()
    assert kept == {0, 1, 2, 3, 4, 5, 9}


@pytest.mark.parametrize(
    "text",
    [
        "add a handwritten note",
        "in neat handwriting",
        "a typewritten page",
        "add subtitles",
        "a newspaper headline",
        "add the phrase hello",
        "a quote of Goethe",
        "Chinese characters on the wall",
        "another typeface",
        "calligraphy on paper",
        "translate it into French",
        "the alphabet on a blackboard",
        "a tattoo of a name",
    ],
)
def test_texts_about_writing_keep_their_side(text):
    assert _SIDED.search(text)
    assert not _SIDED.search("remove the cat from the sofa in bright light")


def test_customization_has_its_prefix_and_questions(found, made, tmp_path):
    subjects = record_sets.photograph_records(30, source="subjects", edit_types=("customization",))
    tasks = {
        "editing": pipeline.Task(
            RecordSource({"photographs": found}, BUCKETS),
            {"remove": 0.5, "style": 0.5},
            questions.EDITING,
            questions.TASK_PREFIXES["editing"],
            0.75,
        ),
        "customization": pipeline.Task(
            RecordSource({"subjects": record_sets.write(tmp_path, subjects)}, BUCKETS),
            {"customization": 1.0},
            questions.CUSTOMIZATION,
            questions.TASK_PREFIXES["customization"],
            0.25,
        ),
    }
    tools = record_sets.tokenizers()
    dataset = pipeline.npedit(tasks, Feed(0, 8), guidance=record_sets.GUIDANCE, **tools)
    tallies = collections.Counter()
    for step in range(40):
        batch = dataset[step]
        for row, id in enumerate(ids_of(batch)):
            task = "customization" if id.startswith("subjects") else "editing"
            tallies[task] += 1
            said = words(tools["text"], batch["instruction_ids"][row], batch["instruction_mask"][row])
            caption = words(tools["text"], batch["caption_ids"][row], batch["caption_mask"][row])
            asked = words(tools["scorer"], batch["question_ids"][row, 0], batch["question_mask"][row, 0])
            assert questions.TASK_PREFIXES[task] in said
            assert questions.TASK_PREFIXES[task] not in caption + asked
            assert ("You judge whether an image shows what was asked for" in asked) == (task == "customization")
            assert batch["guidance"][row] == record_sets.GUIDANCE[RecordSource.edit_types[batch["edit_type"][row]]]
    assert tallies["customization"] == pytest.approx(80, abs=8)


def test_packed_questions_that_do_not_fit_are_bad_records(made, tmp_path):
    long = list(made)
    record_sets.changed(long, 3, instruction="remove " + "very " * 200 + "old cat")
    found = record_sets.write(tmp_path, long)
    dataset = edits(found, Feed(0, 8), weights={"style": 1.0}, packed_length=420)
    told = [dataset[step][batches.NOTES] for step in range(10)]
    named = {str(one["id"][row]): str(one["reason"][row]) for one in told for row in range(8) if one["reason"][row]}
    assert named == {"photographs/0003": "text"}
    cut = {str(one["id"][row]) for one in (edits(found, Feed(0, 8), weights={"style": 1.0})[s][batches.NOTES]
                                           for s in range(10)) for row in range(8) if one["cut"][row]}  # fmt: skip
    assert cut == {"photographs/0003"}
