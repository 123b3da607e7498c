"""The order of the batches, whatever the sets: epochs are whole, hosts agree, and a restart changes nothing."""

import collections
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npedit_jax.data import batches
from npedit_jax.data.batches import Feed, Reading, Stream

STEPS = 10
SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 11, 13, 31, 37])  # smaller than a batch, prime, none at all
tables = st.integers(1, 3).flatmap(
    lambda buckets: st.lists(st.tuples(*[SIZES] * buckets).filter(any), min_size=1, max_size=4)
)


def draw(name, bucket, number, rng):
    """A sample that says which it is; every fifth is bad."""
    bad = (7 * number + bucket) % 5 == 0
    return {
        "id": np.str_(f"{name}/{bucket}/{number}"),
        "drawn": rng.random(),
        "weight": np.float32(not bad),
        batches.NOTES: batches.notes(f"{name}/{bucket}/{number}", reason="spoilt" if bad else ""),
    }


@pytest.mark.parametrize("good_before", [0, 3_000_000])
def test_a_lost_mount_ends_the_run_however_much_was_read_before(good_before):
    def notes(bad):
        reason = np.array(["unreadable"] * bad + [""] * (100 - bad))
        return {"reason": reason, "cut": np.zeros(100, bool), "id": reason, "message": reason}

    iterator = batches.Batches(None, Reading(max_bad_share=0.01))
    iterator.set_state({"next_index": 0, "counts": {"samples": good_before}})
    for step in range(40):
        iterator._note(notes(step % 2))  # half of what is allowed
    with pytest.raises(batches.TooManyBadRecords, match="were bad: {'bad/unreadable': .*max_bad_share"):
        for _ in range(12):
            iterator._note(notes(20))
    assert iterator.counts["samples"] <= good_before + 4200


@settings(deadline=None, max_examples=10)
@given(
    tables,
    st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    st.tuples(st.integers(0, 2), st.sampled_from([4, 12]), st.integers(0, 99)),
    st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, STEPS - 1)),
)
def test_epochs_are_whole_and_a_restart_on_other_hosts_loses_and_repeats_nothing(sizes, weights, feed, restart):
    (inner, total, seed), (hosts, then, stop) = feed, restart
    streams = {
        f"s{number}": Stream(weights[number], own, functools.partial(draw, f"s{number}"))
        for number, own in enumerate(sizes)
    }

    def dataset(number, of):
        return batches.batches(streams, Feed(seed, total // of, (number,), of, inner))

    whole = [dataset(0, 1)[step] for step in range(STEPS)]
    seen = collections.defaultdict(list)
    for batch in whole:
        assert len({id.split("/")[1] for id in batch["id"].ravel()}) == 1  # one bucket a step
        for id in batch["id"].ravel():
            part, number = id.rsplit("/", 1)
            seen[part].append(int(number))
    for part, numbers in seen.items():
        name, bucket = part.split("/")
        size = sizes[int(name[1:])][int(bucket)]
        for start in range(0, len(numbers), size):
            epoch = numbers[start : start + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))

    parts = [[] for _ in range(STEPS)]
    for number in range(hosts):
        iterator = batches.iterate(dataset(number, hosts), Reading(max_bad_share=1.0, threads=2))
        for step in range(stop):
            parts[step].append(next(iterator))
    state = iterator.get_state()
    for number in range(then):
        iterator = batches.iterate(dataset(number, then), Reading(max_bad_share=1.0))
        iterator.set_state(state)
        for step in range(stop, STEPS):
            parts[step].append(next(iterator))
    for batch, shares in zip(whole, parts, strict=True):
        for field in ("id", "drawn", "weight"):
            together = np.concatenate([share[field] for share in shares], axis=1 if inner else 0)
            np.testing.assert_array_equal(together, batch[field])
