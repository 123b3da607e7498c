"""Every field of a config is named by it: a missing, misspelt or half given one is told with the place where it is."""

import pytest
from ml_collections import ConfigDict

from npedit_jax.training import datasets, fields, stages
from tests.training.tiny import autoencoder_config
from tests.training.tiny_networks import lora_config as adapted_config


@pytest.mark.parametrize("make", [autoencoder_config, adapted_config])
def test_complete_config_passes(make):
    fields.check(make())


def test_the_stages_are_those_that_have_fields():
    assert fields.OF_STAGE.keys() == stages.STEPS.keys()


def test_templates_of_another_name_are_told():
    config = ConfigDict(dict(stage="scorer", data=dict(templates="painting")))
    with pytest.raises(ValueError, match="unknown question templates 'painting'"):
        datasets.build(config, {})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("guard", "config lacks guard; its fields are stage, "),
        ("sampling", "config lacks sampling;"),
        ("guard.window", "config.guard lacks window; its fields are skipped_share, window, data_seconds"),
        ("data.reading.buffer", "config.data.reading lacks buffer"),
        ("data.text_length", "config.data lacks text_length"),
        ("data.options.fraction", "config.data.options lacks fraction"),
        ("log.profile_steps", "config.log lacks profile_steps"),
        ("sampling.eta", "config.sampling lacks eta"),
        ("lora.alpha", "config.lora lacks alpha"),
        ("networks.student.options", "config.networks.student lacks options"),
    ],
)
def test_missing_field_is_told(name, told):
    config = adapted_config()
    place, _, last = name.rpartition(".")
    with config.unlocked():
        del _at(config, place)[last]
    with pytest.raises(ValueError) as error:
        stages.check(config)
    assert str(error.value).startswith(told)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gaurd", "config has unknown gaurd;"),
        ("fake_updates", "config has unknown fake_updates;"),  # of another stage
        ("data.reading.thread", "config.data.reading has unknown thread"),
        ("data.records", "config.data lacks buckets; its fields are reading"),  # goes with another
        ("data.recrods", "config.data has unknown recrods"),
        ("checkpoint.evry", "config.checkpoint has unknown evry"),
        ("lora.ranks", "config.lora has unknown ranks"),
    ],
)
def test_field_that_the_stage_does_not_have_is_told(name, told):
    config = adapted_config()
    place, _, last = name.rpartition(".")
    with config.unlocked():
        _at(config, place)[last] = 1
    with pytest.raises(ValueError) as error:
        stages.build(config)
    assert str(error.value).startswith(told)


def _at(config, place):
    for name in filter(None, place.split(".")):
        config = config[name]
    return config
