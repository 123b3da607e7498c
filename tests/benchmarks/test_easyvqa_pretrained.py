"""The figures of the shipped networks, on as few images as they take."""

import numpy as np
import pytest

from benchmarks import easyvqa_pretrained

OPTIONS = {"base": dict(steps=2), "scorer": dict(rounds=1)}


@pytest.mark.parametrize("stage", easyvqa_pretrained.STAGES)
def test_figures_of_a_stage(stage, monkeypatch):
    monkeypatch.setattr(easyvqa_pretrained, "BATCH", 2)
    figures = dict(easyvqa_pretrained.STAGES[stage](None, 2, **OPTIONS.get(stage, {})))
    assert figures and all(np.isfinite(value) and value >= 0 for value in figures.values())
    assert all(value <= 100 for name, value in figures.items() if name.endswith("%"))
