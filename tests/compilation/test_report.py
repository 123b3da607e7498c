"""Reports of all programs of a run, on networks of a few hundred parameters compiled for this machine's CPU."""

import dataclasses
import json

import jax
import pytest

from npedit_jax import chips, parallel
from npedit_jax.compilation import programs, report
from npedit_jax.training import stages
from tests.training.tiny_networks import lora_config as adapted_config

CHIP = chips.CHIPS["v5e"]


def make_config(**networks):
    """The warm-up without adapters."""
    config = adapted_config()
    with config.unlocked():
        del config.lora, config.networks.base
    for name, options in networks.items():
        config.networks[name].options.update(options)
    return config


@pytest.fixture(scope="module")
def plain():
    return report.compile_run(make_config(), parallel.make_mesh(), CHIP, (64, 64))


def test_a_run_that_fits_is_reported_whole(plain):
    assert plain.fits and set(plain.programs) == {"step", "sample", "notes"}
    step = plain.programs["step"]
    # What lies on the device throughout is in the peak, and so is what the program makes.
    assert step.peak >= plain.resident + step.temporaries > plain.resident > 0
    assert step.runs == 1.0 and plain.programs["sample"].runs == 0.0
    assert 0.8 < step.executed / step.useful < 1.05
    assert plain.step()["seconds"] == step.seconds == max(step.times.values())
    assert 0 < plain.step()["bound_mfu"] <= 1.05
    json.dumps(plain.to_json())
    told = report.text(plain, "here")
    assert "step: arguments" in told and "outer step:" in told and "NOT FIT" not in told


def test_rematerialisation_is_executed_and_not_useful(plain):
    full = report.compile_run(
        make_config(student=dict(remat="full")), parallel.make_mesh(), CHIP, (64, 64), only="step"
    )
    assert full.programs["step"].useful == plain.programs["step"].useful
    assert full.programs["step"].executed > 1.1 * plain.programs["step"].executed
    assert set(full.programs) == {"step"}


def test_what_does_not_fit_is_named_with_its_largest_arrays():
    small = dataclasses.replace(CHIP, memory=1e5)
    found = report.compile_run(make_config(), parallel.make_mesh(), small, (64, 64), only="step")
    assert not found.fits
    assert "step peaks at" in found.failures[0] and "85%" in found.failures[0] and "MiB" in found.failures[0]
    assert "DOES NOT FIT: step peaks" in report.text(found, "here")


def test_resident_bytes_are_those_of_the_state_and_the_frozen_networks():
    config, mesh = make_config(), parallel.make_mesh()
    _, held = programs.resident(config, mesh)
    expected = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((held.state, held.frozen)))
    assert held.bytes_per_device() == expected
    made = stages.abstract_networks(config)
    student = sum(x.size * 4 for x in jax.tree.leaves(made["student"].params))
    others = sum(x.size * x.dtype.itemsize for name in held.frozen for x in jax.tree.leaves(made[name].params))
    assert 4 * student + others <= expected < 4 * student + others + 100  # parameters, two moments, average; counters


def test_a_name_that_no_program_has_is_told():
    with pytest.raises(ValueError, match="no program's name holds 'smaple'; they are .*sample"):
        report.compile_run(make_config(), parallel.make_mesh(), CHIP, (64, 64), only="smaple")


def test_other_stages_are_refused():
    config = make_config()
    config.stage = "base"
    with pytest.raises(ValueError, match="stage 'base'"):
        programs.programs(config, parallel.make_mesh(), (64, 64))


@pytest.mark.parametrize("topology", ["v5p", "v4:2x2", "v5e:4*4", "v5e:"])
def test_unknown_topology_is_told(topology):
    with pytest.raises(ValueError, match="unknown topology.*CHIP:AxB"):
        chips.chip_of(topology)


def test_kinds_of_devices_have_the_peaks_of_their_chips():
    peak = lambda kind: chips.peak_flops(type("Device", (), {"device_kind": kind})())  # noqa: E731
    assert peak("TPU v5 lite") == chips.CHIPS["v5e"].flops
    assert peak("TPU v5") == peak("TPU v5p") == chips.CHIPS["v5p"].flops
    assert peak("TPU v6 lite") == chips.CHIPS["v6e"].flops
    assert peak("NVIDIA H200") == peak("NVIDIA H100 80GB HBM3") > peak("NVIDIA H100 PCIe")
    assert peak("cpu") is None
