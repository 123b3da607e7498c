"""The shipped networks of the small experiment load strictly, fit its configs and do what they are for."""

import functools
import pathlib
import runpy

import pytest

from benchmarks import easyvqa_pretrained
from npedit_jax import weights
from npedit_jax.training import networks

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "npedit_jax" / "pretrained" / "easyvqa"
# What a network that does its job is above on the images below, and one of noise far away from.
FLOORS = {
    "round trip read as what the image shows, %": 95,
    "captions drawn with the right color, guidance 2, %": 85,
    "captions drawn with the right kind, guidance 2, %": 60,
    "recolor edit": 85,
    "remove edit": 85,
    "replace edit": 80,
    "recolor identity": 65,
    "vqa": 90,
    "replace look": 90,
}
# Between even and clearly uneven new outlines, mean P(done): what the editor learns crisp shapes from.
OUTLINES_APART = {"circle": 0.2, "rectangle": 0.3, "triangle": 0.5}


def _config(name):
    return runpy.run_path(str(ROOT / "configs" / "easyvqa" / f"{name}.py"))["get_config"]()


def test_they_are_small_enough_to_ship():
    assert sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.is_file()) <= 25e6


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("autoencoder.autoencoder", "vae"),
        ("base.denoiser", "transformer"),
        ("base.text_encoder", "text_encoder"),
        ("scorer.scorer", "scorer"),
        ("warmup.student", "warmup"),
    ],
)
def test_they_are_what_the_stages_of_their_configs_train(name, folder):
    stage, network = name.split(".")
    spec = _config(stage).networks[network]
    stored = networks.module_of(spec.to_dict() | {"directory": f"package:pretrained/easyvqa/{folder}"})
    if spec.directory:  # the warm-up's student begins as the base
        fresh = networks.module_of(spec)
    else:
        fresh = weights.build(spec.kind, networks.plain(spec.architecture), **spec.options)
    measured = {"vae": ("scaling_factor", "shift_factor")}.get(folder, ())  # when the trained network is exported
    assert stored == fresh.clone(**{field: getattr(stored, field) for field in measured})


def test_the_edit_stage_finds_every_network_that_it_names():
    specs = _config("npedit").networks
    for name, spec in specs.items():
        made = networks.create(spec, rng=None)
        assert made.params, name


@pytest.mark.parametrize("stage", ["autoencoder", "base", "scorer"])
def test_they_do_what_they_are_for(stage, monkeypatch):
    monkeypatch.setattr(easyvqa_pretrained, "BATCH", 10)
    options = {"base": dict(steps=8), "scorer": dict(rounds=1)}.get(stage, {})
    figures = functools.partial(easyvqa_pretrained.STAGES[stage], None, 40)
    found = {name.split(": right of")[0]: value for name, value in figures(**options)}
    floors = {name: floor for name, floor in FLOORS.items() if name in found}
    assert floors
    for name, floor in floors.items():
        assert found[name] >= floor, (name, found[name])


def test_the_scorer_tells_even_outlines_from_uneven_ones():
    found = {name.split(" outline: ")[0]: value for name, value in easyvqa_pretrained.outline_figures(None, 150)}
    for kind, apart in OUTLINES_APART.items():
        assert found[f"new {kind}, even"] - found[f"new {kind}, uneven"] >= apart, kind


def test_the_student_copies_before_it_learns_to_edit(monkeypatch):
    monkeypatch.setattr(easyvqa_pretrained, "BATCH", 10)
    found = dict(easyvqa_pretrained.warmup_figures(None, 40))
    assert found["copy: mean absolute error, 0 to 1"] < 0.02
    assert max(found[f"{name}: done, %"] for name in ("recolor", "remove", "replace")) <= 3
