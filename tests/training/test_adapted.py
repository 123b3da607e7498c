"""Training with adapters: a run of the warm-up through the loop, and the edit stage's loss at the start."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.models import lora
from npedit_jax.training import edit_losses, loop, networks, previews, stages, workdirs
from npedit_jax.weights import adapters
from tests.training.tiny_networks import ADAPTED as TARGETS
from tests.training.tiny_networks import batches, lora_config, parts

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "A" / "transformer"
SETTINGS = edit_losses.EditSettings(times=(1.0, 0.5), scorer_weight=0.5)


def test_a_run_trains_and_keeps_adapters_only(tmp_path):
    workdirs.open_run(tmp_path / "run", lora_config())
    stage = stages.build(lora_config())
    assert stage.networks["student"].params.keys() == {"layers"} and "base" in stage.frozen()
    # A fresh denoiser's gates and last layer are zero, and would pass nothing on to the adapters.
    base = stage.networks["base"]
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), base.params)
    stage = dataclasses.replace(stage, networks=stage.networks | {"base": base._replace(params=noisy)})
    start = jax.device_get(stage.networks["student"].params)  # the run takes the arrays over
    end = loop.run(lora_config(), stage, tmp_path / "run", preview=previews.Previews(lora_config(), tmp_path / "run"))
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    assert shapes(end.params["student"]) == shapes(start) == shapes(end.ema["student"])
    assert all(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start, end.params["student"])), strict=True))
    assert (tmp_path / "run" / "samples" / "step-0000002.png").exists()
    whole = lora.merged({**stage.frozen(), **end.ema}, stage.adapted)["student"]
    assert shapes(whole) == shapes(stage.frozen()["base"])


def test_adapters_of_a_checkpoint_are_merged_into_their_base():
    networks_of_run = stages.build(lora_config()).networks
    trained = jax.tree.map(lambda x: x + 0.1, networks_of_run["student"].params)
    found = stages.whole(lora_config(), {"student": trained})["student"]
    expected = lora.merge(networks_of_run["base"].params, trained, 4.0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_run_starts_from_the_adapters_of_another(tmp_path):
    settings = lora_config()
    stage = stages.build(settings)
    trained = jax.tree.map(lambda x: x + 1.0, stage.networks["student"].params)
    adapters.save(tmp_path / "trained", "zimage", stage.networks["student"].module, trained, settings.lora.alpha)
    again = stages.build(lora_config(start=dict(student=str(tmp_path / "trained")))).networks["student"].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, trained)


def test_adapters_lie_on_the_weights_of_their_base():
    other = lora_config()
    other.networks.base.architecture.n_layers = 3
    with pytest.raises(ValueError, match="architecture is .* give both the same"):
        stages.build(other)


def test_shapes_without_weights_are_those_of_a_run():
    abstract, made = stages.abstract_networks(lora_config()), stages.build(lora_config()).networks
    for name, network in made.items():
        assert abstract[name].module == network.module
        same = jax.tree.map(
            lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract[name].params, network.params
        )
        assert all(jax.tree.leaves(same))


def test_edit_losses_with_fresh_adapters_are_those_of_the_base():
    modules, params = parts()
    batch = jax.tree.map(lambda x: x[-1], batches())
    given = edit_losses.conditions(modules, params, batch)
    draws = edit_losses.draw(jax.random.key(0), given.reference.shape, SETTINGS, low=0.02, high=0.98)
    on_base = lora.Adapted("real_score", 2.0)
    fresh = lora.create(jax.random.key(1), params["real_score"], rank=2, patterns=TARGETS)

    @jax.jit
    def losses(student, fake):
        rest = (params, modules, batch, given, draws, jnp.asarray(0), SETTINGS)
        return edit_losses.student_loss(student, fake, *rest, two_steps=False)

    alone = {"params": params["real_score"]}
    with_adapters = on_base.variables(params, fresh)
    expected, found = losses(alone, alone), losses(with_adapters, with_adapters)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    moved = on_base.variables(params, jax.tree.map(lambda x: x + 0.1, fresh))
    assert float(losses(moved, with_adapters)[0]) != float(expected[0])


def test_a_base_is_stored_and_computed_in_the_types_of_its_options():
    options = dict(dtype="bfloat16", param_dtype="bfloat16")
    spec = dict(kind="zimage", directory=str(GOLDEN), architecture={}, options=options)
    module, params = networks.create(spec, rng=None)
    assert (module.dtype, module.param_dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    module, params = networks.create(spec | dict(options=dict(dtype="bfloat16")), rng=None)
    assert (module.dtype, module.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
