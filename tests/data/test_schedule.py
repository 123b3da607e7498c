"""The order: exact shares, one bucket a step, every sample of a part once an epoch, places reached at random."""

import collections
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npedit_jax.data import schedule
from npedit_jax.data.schedule import Interleave, Schedule

tables = st.integers(1, 6).flatmap(
    lambda streams: st.integers(1, 5).flatmap(
        lambda buckets: st.tuples(
            st.lists(st.integers(1, 1000), min_size=streams, max_size=streams),
            st.lists(
                st.lists(st.integers(0, 300), min_size=buckets, max_size=buckets).filter(sum),
                min_size=streams,
                max_size=streams,
            ),
        )
    )
)


@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (9, 1), (3, 7), (1, 5000), (2500, 2500, 1)])
def test_interleave_visits_each_stream_in_order_with_its_share(counts):
    interleave, period = Interleave(counts, seed=3), sum(counts)
    order = [interleave[index] for index in range(2 * period)]
    for stream, count in enumerate(counts):
        own = [place for chosen, place in order if chosen == stream]
        assert own == list(range(2 * count))
    for start in range(0, 2 * period - 2000, 700):  # and nearly so over any stretch
        chosen = collections.Counter(stream for stream, _ in order[start : start + 2000])
        for stream, count in enumerate(counts):
            assert abs(chosen[stream] - 2000 * count / period) < 60


def test_interleave_gives_every_place_of_a_step_every_stream():
    interleave = Interleave((3, 1), seed=0)
    for place in range(4):  # a step of 4 samples is one period long
        assert {interleave[4 * step + place][0] for step in range(100)} == {0, 1}
    assert interleave[7] == Interleave((3, 1), seed=0)[7] == pickle.loads(pickle.dumps(interleave))[7]
    some = [interleave[i] for i in range(40)]
    assert some != [Interleave((3, 1), seed=1)[i] for i in range(40)]
    assert some != [Interleave((3, 1), seed=0, key=1)[i] for i in range(40)]


@settings(deadline=None, max_examples=150)
@given(tables, st.sampled_from([1, 7, 16, 96]))
def test_plan_has_whole_steps_and_the_shares_that_the_samples_allow(table, samples):
    weights, sizes = np.array(table[0], float), np.array(table[1])
    steps, counts = schedule.plan(weights, sizes, samples)
    assert ((counts > 0) == (sizes > 0)).all()  # no record is left out, however rare its stream in its bucket
    if sizes.shape[1] > 1:
        assert (counts.sum(axis=0) == steps * samples).all()
    if (sizes > 0).all():  # nothing stands in the way: exact, but for what a bucket's one step a period forces
        rows = counts.sum(axis=1) / counts.sum()
        assert abs(rows - weights / weights.sum()).max() <= 2.5 / counts.sum()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=11),
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=3),
    st.sampled_from([1, 7]),
    st.sampled_from([6, 64, 384]),
)
def test_shares_of_edit_types_are_exact_in_any_mixture_of_sets(types, sets, buckets, samples):
    """Weights as configs hold them, to four decimals; those of sets within a type are any numbers."""
    shares = np.floor(1e4 * np.array(types) / sum(types)) / 1e4
    shares[0] += 1.0 - shares.sum()
    weights = (shares[:, None] * np.array(sets) / sum(sets)).ravel()
    sizes = np.random.default_rng(len(types)).integers(5000, 9000, (len(weights), buckets))
    _, counts = schedule.plan(weights, sizes, samples)
    of_types = counts.sum(axis=1).reshape(len(types), -1).sum(axis=1)
    np.testing.assert_allclose(of_types / counts.sum(), shares, rtol=0, atol=1e-12)


def test_shares_of_the_full_size_config_are_exact_in_one_bucket_too():
    weights = np.array([0.2475] + [0.0825] * 9 + [0.01])
    steps, counts = schedule.plan(weights, np.full((11, 1), 1000), 384)
    assert steps.tolist() == [1] and counts[:, 0].tolist() == [99] + [33] * 9 + [4]


def test_shares_of_the_full_size_config_are_exact():
    """Ten edit types and "do nothing" over seven buckets, 64 samples and 6 inner batches."""
    rng = np.random.default_rng(0)
    weights = [0.2475] + [0.0825] * 9 + [0.01]
    sizes = rng.integers(200, 90_000, (11, 7))
    steps, counts = schedule.plan(np.array(weights), sizes, 384)
    np.testing.assert_array_equal(counts.sum(axis=1), np.array(weights) * counts.sum())
    # Every bucket of a type is used up at nearly the same time.
    visits = counts / sizes / (counts.sum(axis=1) / sizes.sum(axis=1))[:, None]
    common = steps >= 10
    assert abs(visits[:, common] - 1).max() < 0.12


def test_rare_buckets_come_up_rarely():
    steps, counts = schedule.plan(np.array([1.0]), np.array([[100_000, 30]]), 384)
    assert steps[1] == 1 and 3300 < steps.sum() <= 4000
    assert counts.tolist() == (steps * 384)[None].tolist()


def test_a_step_has_one_bucket_and_an_epoch_every_sample_once():
    sizes = np.array([[40, 10, 30], [7, 3, 0]])
    order = Schedule((0.75, 0.25), sizes, samples=8, seed=5)
    seen = collections.defaultdict(list)
    for index in range(8 * 2000):
        part, rank = order[index]
        first, _ = order[index // 8 * 8]
        assert order.parts[part][1] == order.parts[first][1]
        seen[part].append(rank)
    assert all(ranks == list(range(len(ranks))) for ranks in seen.values())  # what repeat() and shuffle() then map
    total = {part: len(ranks) for part, ranks in seen.items()}
    for stream, share in enumerate((0.75, 0.25)):
        own = {order.parts[part][1]: count for part, count in total.items() if order.parts[part][0] == stream}
        assert sum(own.values()) == pytest.approx(share * 16_000, abs=20)
        for bucket, count in own.items():
            assert count / sum(own.values()) == pytest.approx(sizes[stream, bucket] / sizes[stream].sum(), abs=0.03)


def test_places_are_reached_at_random_and_by_any_seed():
    sizes = np.array([[40, 10], [7, 30]])
    order, again = (Schedule((1, 1), sizes, samples=4, seed=5) for _ in range(2))
    places = np.random.default_rng(0).integers(0, 10**7, 50).tolist()
    assert [order[place] for place in places] == [again[place] for place in reversed(places)][::-1]
    other = Schedule((1, 1), sizes, samples=4, seed=6)
    assert [order[4 * step][0] for step in range(50)] != [other[4 * step][0] for step in range(50)]


def test_apportion():
    assert schedule.apportion(np.array([1.5, 2.5, 0.0, 6.0]), 10, np.array([1, 1, 0, 1])).tolist() == [2, 2, 0, 6]
    assert schedule.apportion(np.array([0.1, 9.9]), 10, np.array([1, 1])).tolist() == [1, 9]
    assert schedule.apportion(np.array([-3.0, 13.0]), 10, np.array([2, 1])).tolist() == [2, 8]
    assert schedule.apportion(np.array([0.1, 0.2, 0.7]), 1, np.zeros(3, np.int64) + [0, 0, 1]).tolist() == [0, 0, 1]


def test_streams_without_samples_are_an_error():
    with pytest.raises(ValueError, match="every stream needs samples"):
        Schedule((1, 1), np.array([[3, 3], [0, 0]]), samples=4, seed=0)
