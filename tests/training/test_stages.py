"""What stages make of a config: schedules in steps, feeds, and fields that a function does not take."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from npedit_jax.data import tokenize
from npedit_jax.data.batches import arrays
from npedit_jax.training import datasets, networks, optimizer, stages
from npedit_jax.training.edit_losses import EditSettings
from tests.training.tiny import autoencoder_config
from tests.training.tiny_networks import easyvqa_config

ADAM = dict(name="adam", b1=0.0, b2=0.9, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=2)


@pytest.mark.parametrize("updates", [1, 5])
def test_schedule_is_told_in_steps_however_many_updates_a_step_has(updates):
    rule = stages._rule(ConfigDict(ADAM), steps=6, updates=updates)
    params, moved = {"kernel": jnp.ones(1)}, []
    state = rule.init(params)
    for _ in range(6 * updates):
        change, state = rule.update({"kernel": jnp.ones(1)}, state, params)
        moved.append(-float(change["kernel"][0]))  # Adam's first step on a constant gradient is the rate itself
    expected = optimizer.schedule(1.0, 0.1, 2 * updates, 6 * updates)
    assert moved == pytest.approx([float(expected(count)) for count in range(6 * updates)], abs=1e-5)
    assert max(moved) == moved[2 * updates] == pytest.approx(1.0, abs=1e-5)


def test_every_part_of_a_batch_must_fill_the_mesh():
    config = autoencoder_config()
    config.batch_size = 6
    config.mesh.data = 1
    assert datasets._feed(config).batch_size == 6
    with config.unlocked():
        config.step.accumulate = 4
    with pytest.raises(ValueError, match="multiple of 1 x 4: .*step.accumulate; found 6"):
        datasets._feed(config)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(step=dict(emma=0.9)), "config.step: got an unexpected keyword argument 'emma'"),
        (
            dict(optimizer=dict(autoencoder=dict(speed=2))),
            "config.optimizer: got an unexpected keyword argument 'speed'",
        ),
    ],
)
def test_field_that_nothing_takes_is_told(fields, told):
    config = autoencoder_config()
    with config.unlocked():
        config.update(fields)
    with pytest.raises(ValueError, match=told):
        stages.build(config)


def test_questions_of_a_config_reach_the_batch():
    config = easyvqa_config("npedit")
    with config.unlocked():
        text = "is there a {object} or another shape in the image?"
        config.data.questions = dict(edit_recolor=dict(text=text, images=(1,), answer=False))
        config.data.options.edit_weights = dict(recolor=1.0)
        config.data.options.guidance = dict(recolor=2.0)
    stages.check(config)
    modules = {name: networks.module_of(config.networks[name]) for name in ("scorer",)}
    batch = arrays(datasets.build(config, modules)[0])
    tokenizer = tokenize.read_tokenizer(networks.resolve(config.data.scorer_tokenizer))
    assert not batch["answer"][..., 0].any() and batch["answer"][..., 1].all()
    asked = [tokenizer.decode(row.tolist()) for row in np.concatenate(np.concatenate(batch["question_ids"]))]
    assert all("or another shape in the image" in text for text in asked[0::2])
    assert all("is the rest the same after" in text for text in asked[1::2])


@pytest.mark.parametrize("times", [(0.9, 0.5), (1.0, 0.5, 0.75), (1.0, 0.0), (1.0, 1.0, 0.5), ()])
def test_times_must_fall_from_one(times):
    with pytest.raises(ValueError, match="step.times must fall from 1.0"):
        EditSettings(times=times)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"scorer_form": "mse"}, "step.scorer_form must be one of"),
        ({"dmd_normalizer": "mean"}, "step.dmd_normalizer must be one of"),
        ({"dmd_low": 0.9, "dmd_high": 0.1}, "step.dmd_low and dmd_high must rise"),
        ({"guidance_high": 1.5}, "step.guidance_low and guidance_high must rise"),
        ({"accumulate": 0}, "step.accumulate must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_told_before_anything_is_loaded(fields, told):
    with pytest.raises(ValueError, match=told):
        EditSettings(times=(1.0, 0.5), **fields)
