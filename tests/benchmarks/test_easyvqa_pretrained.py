"""The figures of the small experiment's networks, of networks full of noise on two images."""

import numpy as np
import pytest

from benchmarks import easyvqa_pretrained
from npedit_jax import weights
from npedit_jax.training import networks
from tests import tiny_editor

ARCHITECTURES = {
    "autoencoder": tiny_editor.AUTOENCODER,
    "qwen3": tiny_editor.TEXT_ENCODER,
    "zimage": tiny_editor.STUDENT,
    "internvl": tiny_editor.SCORER,
}
FIGURES = {
    "autoencoder": "round trip read as what the image shows, %",
    "base": "captions drawn with the right color, guidance 2, %",
    "warmup": "remove: done, %",
    "scorer": "vqa: right of",
    "outlines": "new ",
}
OPTIONS = {"base": dict(steps=2), "scorer": dict(rounds=8)}


def _noise(kind, folder):
    module = weights.build(kind, networks.plain(ARCHITECTURES[kind]))
    return networks.Network(module, tiny_editor.noise(networks.shapes(kind, module)))


@pytest.mark.parametrize("stage", easyvqa_pretrained.STAGES)
def test_figures_of_a_stage(stage, monkeypatch):
    monkeypatch.setattr(easyvqa_pretrained, "BATCH", 2)
    monkeypatch.setattr(easyvqa_pretrained, "shipped", _noise)
    figures = dict(easyvqa_pretrained.STAGES[stage](None, 2, **OPTIONS.get(stage, {})))
    assert any(name.startswith(FIGURES[stage]) for name in figures), list(figures)
    assert all(np.isfinite(value) and value >= 0 for value in figures.values())
    assert all(value <= 100 for name, value in figures.items() if name.endswith("%"))
