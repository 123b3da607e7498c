"""Training with adapters: a run of the warm-up through the loop, and the edit stage's updates of two."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.models import lora
from npedit_jax.training import edit_losses, edit_step, loop, networks, optimizer, previews, stages, state, workdirs
from npedit_jax.weights import adapters
from tests.training.tiny_networks import ADAPTED as TARGETS
from tests.training.tiny_networks import batches, lora_config, parts

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "A" / "transformer"
SETTINGS = edit_losses.EditSettings(times=(1.0, 0.5), scorer_weight=0.5, dmd_normalizer="sample", max_unroll=1)


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


def test_updates_of_two_adapters_on_one_base_are_those_of_their_merged_weights():
    """Two adapters, neither of them zero, one for the student and one for the fake score, and an update of each."""
    modules, params = parts()
    names, base = ("student", "fake_score"), params["real_score"]
    fresh = {name: lora.create(jax.random.key(i), base, rank=2, patterns=TARGETS) for i, name in enumerate(names)}
    trained = {
        name: jax.tree.map(lambda x, i=i: x + 0.2 * jax.random.normal(jax.random.key(7 + i), x.shape), tree)
        for i, (name, tree) in enumerate(fresh.items())
    }
    frozen = {name: tree for name, tree in params.items() if name not in names}
    rules = dict.fromkeys(names, optimizer.build("adam", learning_rate=0.1, b1=0.0, b2=0.9))
    updates = edit_step.Updates(modules, rules, SETTINGS, dict.fromkeys(names, lora.Adapted("real_score", 2.0)))
    batch = jax.tree.map(lambda x: x[-1], batches()) | {"identity_weight": np.ones(2, np.float32)}
    rng, two_steps = jax.random.key(0), False

    @jax.jit
    def update(state, frozen):
        state, of_fake = updates.fake_score(state, frozen, batch, rng, two_steps)
        state, of_student = updates.student(state, frozen, batch, rng, two_steps)
        return state, of_fake | of_student

    @jax.jit
    def losses(student, fake, fake_after):
        given = edit_losses.conditions(modules, frozen, batch)
        draw = lambda low, high: edit_losses.draw(rng, given.reference.shape, SETTINGS, low=low, high=high)  # noqa: E731
        student, fake, fake_after = ({"params": tree} for tree in (student, fake, fake_after))
        rest = (frozen, modules, batch, given, draw(SETTINGS.dmd_low, SETTINGS.dmd_high), jnp.asarray(0), SETTINGS)
        _, metrics = edit_losses.student_loss(student, fake_after, *rest, two_steps=two_steps)
        rest = (modules, batch, given, draw(0.0, 1.0))
        return metrics | {"loss/fake_score": edit_losses.fake_score_loss(fake, student, *rest, two_steps=two_steps)}

    def assert_merged(start):
        end, found = update(state.create(start, rules, ("student",)), frozen)
        merge = lambda tree: lora.merge(base, tree, 2.0)  # noqa: E731
        expected = losses(*(merge(tree) for tree in (*start.values(), end.params["fake_score"])))
        for name in ("loss", "loss/dmd", "loss/scorer", "loss/identity", "loss/fake_score"):
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, err_msg=name)
        return end, expected

    end, expected = assert_merged(trained)
    for name in names:
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), end.params[name], trained[name])
        assert all(jax.tree.leaves(moved))
    _, swapped = assert_merged(dict(zip(names, reversed(trained.values()), strict=True)))
    for name in ("loss/dmd", "loss/identity", "loss/fake_score"):
        assert abs(swapped[name] - expected[name]) > 1e-3 * abs(expected[name]), name
    assert_merged(fresh)  # whose merged weights are the base's


def test_a_base_is_stored_and_computed_in_the_types_of_its_options():
    options = dict(dtype="bfloat16", param_dtype="bfloat16")
    spec = dict(kind="zimage", directory=str(GOLDEN), architecture={}, options=options)
    module, params = networks.create(spec, rng=None)
    assert (module.dtype, module.param_dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    module, params = networks.create(spec | dict(options=dict(dtype="bfloat16")), rng=None)
    assert (module.dtype, module.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
