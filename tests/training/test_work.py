"""What a run tells of its speed is counted from its batches and its networks."""

import jax
import pytest

from npedit_jax import chips
from npedit_jax.training import stages, work
from tests.training.tiny import autoencoder_config
from tests.training.tiny_networks import QUESTION_TOKENS, easyvqa_config

SIDE = 64  # pixels of easy-VQA's images


def test_flops_are_counted_where_the_peak_is_known_and_follow_the_batch(monkeypatch):
    config = autoencoder_config()
    assert work.of_step(config, stages.build(config)) == (2, 2 * (SIDE // 2) ** 2, 1, 0.0, None)
    monkeypatch.setattr(chips, "peak_flops", lambda device: 1e12)
    found = work.of_step(config, stages.build(config))
    config.batch_size = 6
    larger = work.of_step(config, stages.build(config))
    assert found.flops > 0 and larger.flops == pytest.approx(3 * found.flops, rel=1e-6)
    assert (larger.samples, larger.tokens, larger.peak_flops) == (6, 3 * found.tokens, 1e12)


def test_an_edit_step_works_through_all_inner_batches():
    config = easyvqa_config("npedit", fake_updates=3, batch_size=2)
    stage = stages.build(config)
    found = work.of_step(config, stage)
    assert found.samples == 4 * 2
    patch = stage.modules["autoencoder"].downscale * stage.modules["student"].patch_size
    texts = 2 * config.data.text_length + 2 * QUESTION_TOKENS
    assert found.tokens == found.samples * ((SIDE // patch) ** 2 + texts)
    assert found.devices == jax.device_count() == 1
