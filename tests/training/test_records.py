"""Training from records: past bad records, interrupted and resumed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from npedit_jax.data.batches import TooManyBadRecords
from npedit_jax.training import datasets, stages, steps
from npedit_jax.training.checkpoint import Checkpoints
from tests.data import record_sets
from tests.training import runs
from tests.training.tiny import LOG
from tests.training.tiny_networks import warmup_config


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """60 records, two of which are damaged."""
    made = record_sets.photograph_records(60)
    record_sets.changed(made, 7, image=b"no image")
    record_sets.changed(made, 20, image=made[20].image[:-500])
    directory = tmp_path_factory.mktemp("records") / "photographs"
    record_sets.write(directory, made)
    return directory


def config(directory, **reading) -> ConfigDict:
    """Six steps of the warm-up, an epoch, at a size that tiny networks can take."""
    data = dict(
        records=str(directory),
        buckets=record_sets.BUCKETS[:1],
        reading=dict(workers=0, threads=1, buffer=2, max_bad_share=0.1) | reading,
        text_tokenizer=str(record_sets.GOLDEN),
        text_length=record_sets.TEXT_LENGTH,
        options=dict(caption_dropout=0.1, fraction=1.0, flip=0.5),
    )
    checkpoint, log = dict(every=3, keep=2), LOG | dict(preview_every=100)
    return warmup_config(data, vocabulary=300, places=128, steps=6, batch_size=10, checkpoint=checkpoint, log=log)


def test_sets_are_told_apart_by_their_own_names(tmp_path):
    """Prepared sets lie in directories of one name."""
    paths = {name: tmp_path / name / "1.0.0" for name in ("cats", "dogs", "1.0.0")}
    for name, path in paths.items():
        record_sets.write(path, record_sets.photograph_records(1), name if name != "1.0.0" else "")
    sets, weights = datasets._sets(",".join(f"{path}={number}" for number, path in enumerate(paths.values())))
    assert {name: found.directory for name, found in sets.items()} == paths
    assert weights == {"cats": 0.0, "dogs": 1.0, "1.0.0": 2.0}
    with pytest.raises(ValueError, match="two sets of records are called 'dogs'.*manifest.json"):
        datasets._sets(f"{paths['dogs']},{paths['dogs']}/")


@pytest.fixture(scope="module")
def stage(directory):
    """Built once, so that its program is compiled once."""
    return stages.build(config(directory))


def test_interrupted_run_repeats_the_uninterrupted_one(directory, stage, tmp_path):
    whole = runs.start(config(directory), stage, tmp_path / "whole")
    short = config(directory)
    short.steps = 3
    runs.start(short, stage, tmp_path / "parts")
    # As if the first start had been stopped and not been asked for three steps.
    (tmp_path / "parts" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    again = runs.start(config(directory, threads=2), stage, tmp_path / "parts")
    for a, b in zip(*map(jax.tree.leaves, (whole.params, again.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = runs.untimed(tmp_path / "whole")
    assert rows == runs.untimed(tmp_path / "parts")
    counted = {name: count for name, count in rows[-1].items() if name.startswith("data/")}  # an epoch of 60 records
    assert counted == {"data/bad": 2, "data/bad/unknown": 1, "data/bad/truncated": 1, "data/cut": 0}


def test_too_many_bad_records_end_the_run(directory, stage, tmp_path):
    settings = config(directory, max_bad_share=0.001)  # of a thousand samples at least: the second one is too many
    settings.checkpoint.every = 1
    with pytest.raises(TooManyBadRecords, match="2 of [0-9]+ samples") as error:
        runs.start(settings, stage, tmp_path / "run")
    done = int(re.search(r"of (\d+) samples", str(error.value))[1]) // 10 - 1
    assert done > 0 and Checkpoints(tmp_path / "run", every=1, keep=2, read_only=True).latest() == done
    assert runs.untimed(tmp_path / "run")[-1]["step"] == done


def test_nothing_is_compiled_after_the_first_step_of_a_bucket(directory, tmp_path):
    settings = config(directory)
    settings.data.buckets, settings.steps, settings.checkpoint.every = record_sets.BUCKETS[:2], 8, 100
    made, compiled, ended, sizes = stages.build(settings), [], [], []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append((len(sizes), len(ended)))

    def step(state, frozen, batch, rng):
        sizes.append(batch["reference"].shape[1:3])
        result = made.step(state, frozen, batch, rng)
        ended.append(len(sizes))
        return result

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        runs.start(settings, dataclasses.replace(made, step=step), tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert set(sizes) == set(record_sets.BUCKETS[:2])
    assert max(sizes.count(size) for size in set(sizes)) > 2
    in_steps = {begun for begun, ended in compiled if begun > ended}
    assert in_steps == {sizes.index(size) + 1 for size in set(sizes)}, (sizes, compiled)
    # The key of a step, and what sums up a checkpoint.
    assert {begun for begun, ended in compiled if begun == ended} <= {0, 8}, (sizes, compiled)


def test_samples_of_weight_zero_change_nothing():
    losses, weight = jnp.array([1.0, 5.0, 3.0]), jnp.array([1.0, 0.0, 1.0])
    assert steps.average(losses, weight) == 2.0
    assert jax.grad(lambda x: steps.average(x, weight))(losses).tolist() == [0.5, 0.0, 0.5]
    assert steps.average(losses, jnp.zeros(3)) == 0.0
