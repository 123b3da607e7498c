"""Run by test_sharded.py with 8 CPU devices: the outer step on several meshes against one device.

    python -m tests.training.sharded_steps DIRECTORY UNROLL MESH...

Also in 2 processes of 4 devices each, which NPEDIT_HOSTS joins; checkpoints are then left to other tests.

Networks have a few hundred parameters; gradients are recorded before the optimizer, Adam's rate is the real one.
"""

import dataclasses
import functools
import os
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from npedit_jax import parallel
from npedit_jax.models import layers
from npedit_jax.models.denoiser import Denoiser
from npedit_jax.training import edit_step, hosts, networks, optimizer, state, steps
from npedit_jax.training.checkpoint import Checkpoints
from npedit_jax.training.edit_losses import EditSettings
from tests.models import test_flash_attention
from tests.training.test_outer_step import recording
from tests.training.tiny_networks import batches, parts

# A weight per latent pixel divides by differences near 0, which no two orders of summation round alike.
SETTINGS = EditSettings(times=(1.0, 0.5), scorer_weight=0.5, skip_norm=1e9, dmd_normalizer="sample")
SAMPLES = 8
MESHES = {"fsdp": (1, 8, 1), "all axes": (2, 2, 2)}
LOSSES = ("loss", "loss/dmd", "loss/scorer", "loss/identity", "loss/fake_score")
SEEDS, TOLERANCE = (
    (0, 1, 2, 4, 5),
    1e-5,
)  # keys whose steps all unroll two where they may: one length compiles in half the time
# Rounding the parameters another way by one bit moves the student's gradients by 6e-5 of their norm.
GRADIENT_TOLERANCE = 1e-4


COMPILED: list[str] = []


def note_compilation(event: str, seconds: float, **_: Any) -> None:
    """Listens to jax."""
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


def batch(step: int) -> dict[str, np.ndarray]:
    """Batches of tiny_networks, with more samples, each another image."""

    def widen(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x] * (SAMPLES // x.shape[1]), axis=1)

    made = {name: x if name in parallel.SHARED else widen(np.asarray(x)) for name, x in batches().items()}
    made["reference"] = np.random.default_rng(step).integers(0, 256, made["reference"].shape).astype(np.uint8)
    return made


def host_batch(step: int, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """This process's share."""
    places, of = parallel.host_places(mesh)
    own = [place * SAMPLES // of + inside for place in places for inside in range(SAMPLES // of)]
    return {name: x if name in parallel.SHARED else x[:, own] for name, x in batch(step).items()}


def whole_tree(tree: Any) -> Any:
    """On every process."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def run(
    mesh: jax.sharding.Mesh, settings: EditSettings
) -> tuple[state.TrainState, list[dict[str, float]], dict[str, Any]]:
    """The last state, every step's metrics, and each trained network's gradients of the first step."""
    modules, params = parts()
    adam = optimizer.build("adam", learning_rate=2e-5, b1=0.0, b2=0.9, clip_norm=2.0)
    rules = {name: optax.chain(recording(), adam) for name in ("student", "fake_score")}
    place = lambda name: parallel.put(params[name], parallel.parameter_shardings(mesh, params[name]))  # noqa: E731
    trained = {name: place(name) for name in rules}
    frozen = {name: place(name) for name in params if name not in rules}
    of_frozen = jax.tree.map(lambda x: x.sharding, frozen)
    create = lambda trained: state.create(trained, rules, ("student",))  # noqa: E731
    shardings = state.shardings(mesh, jax.eval_shape(create, trained))
    whole = parallel.replicated(mesh)
    with jax.set_mesh(mesh):
        now = parallel.place(create, shardings, trained)
        updates = edit_step.parts(edit_step.Updates(modules, rules, settings))
        programs = {name: steps.compile_step(update, shardings, of_frozen) for name, update in updates.items()}
        step_function = edit_step.separate_steps(programs, settings)
        found, gradients = [], {}
        for step, seed in enumerate(SEEDS):
            key = parallel.place(functools.partial(jax.random.key, seed), whole)
            compiled_before = len(COMPILED)
            now, metrics = step_function(now, frozen, parallel.put_batch(host_batch(step, mesh), mesh, 1), key)
            assert step == 0 or len(COMPILED) == compiled_before, "a program was compiled after the first step"
            found.append(jax.device_get(metrics))
            gradients = gradients or {name: whole_tree(now.optimizer[name][0].gradients) for name in rules}
    return now, found, gradients


def assert_close(found: Any, expected: Any, what: str) -> None:
    """The whole tree to the tolerance, each array to ten times that, beside rounding of the whole."""
    norm = lambda tree: np.sqrt(sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(tree)))  # noqa: E731
    difference, whole = jax.tree.map(np.subtract, found, expected), norm(expected)
    assert norm(difference) <= GRADIENT_TOLERANCE * whole, (what, norm(difference), whole)
    for (path, error), x in zip(
        jax.tree_util.tree_leaves_with_path(difference), jax.tree.leaves(expected), strict=True
    ):
        assert norm(error) <= 10 * GRADIENT_TOLERANCE * (norm(x) + 1e-3 * whole), (
            what,
            jax.tree_util.keystr(path),
            norm(error),
        )


def main(directory: str, unroll: int, names: list[str]) -> None:
    """Compares losses, gradients and restored checkpoints of the named meshes with one device's."""
    one = parallel.make_mesh(1, 1, 1, jax.local_devices()[:1])
    two = parallel.make_mesh(1, 2, 1, jax.local_devices()[:2])
    settings = dataclasses.replace(SETTINGS, max_unroll=unroll)
    begun, expected, expected_gradients = run(one, settings)
    assert {int(row["unroll"]) for row in expected} == {unroll}
    for name in names:
        sizes = MESHES[name]
        mesh = parallel.make_mesh(*sizes)
        end, found, gradients = run(mesh, settings)
        for network, tree in gradients.items():
            assert_close(tree, expected_gradients[network], f"{name}: gradients of {network}")
        for row, wanted in zip(found, expected, strict=True):
            assert row["unroll"] == wanted["unroll"]
            for loss in LOSSES:
                np.testing.assert_allclose(row[loss], wanted[loss], rtol=TOLERANCE, err_msg=f"{name}: {loss}")
        kernel = end.optimizer["student"][1][1].nu["layers"]["attention"]["query"]["kernel"]
        parts_of_kernel = len({str(shard.index) for shard in kernel.addressable_shards})
        assert parts_of_kernel == sizes[1] * sizes[2], (name, kernel.sharding)
        if jax.process_count() > 1:
            continue
        initialise_in_parts(mesh)
        attend_in_parts(mesh)
        meshes = [one, two, *(parallel.make_mesh(*sizes) for sizes in MESHES.values())]
        restore_elsewhere(f"{directory}/{name}", end, meshes)
        restore_elsewhere(f"{directory}/from one to {name}", begun, [mesh])


def initialise_in_parts(mesh: jax.sharding.Mesh) -> None:
    """No device ever holds a network whole while it is made: by the compiler's count of a device's memory."""
    module = Denoiser(width=384, heads=3, depth=30)
    compiled = lambda make, shardings, rng: jax.jit(make, out_shardings=shardings).lower(rng).compile()  # noqa: E731
    with mock.patch.object(parallel, "place", compiled):
        memory = networks.initialise("zimage", module, jax.random.key(0), mesh).memory_analysis()
    whole = sum(4 * x.size for x in jax.tree.leaves(networks.shapes("zimage", module)))
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert held < 1.5 * whole / (mesh.shape["fsdp"] * mesh.shape["tensor"]), (held, whole)


def attend_in_parts(mesh: jax.sharding.Mesh) -> None:
    """The flash kernel, its samples and heads split over the mesh, against the plain form: values and gradients."""
    arguments, mask = (
        test_flash_attention.inputs(256, heads=4, batch=SAMPLES),
        test_flash_attention.with_holes(256, SAMPLES),
    )
    with mock.patch.object(layers, "FLASH_LENGTH", 256), jax.set_mesh(mesh):
        found, expected = test_flash_attention.both(arguments, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def restore_elsewhere(directory: str, saved: state.TrainState, meshes: list[jax.sharding.Mesh]) -> None:
    """A checkpoint comes back equal on every mesh, and lies there as that mesh's table says."""
    checkpoints = Checkpoints(directory, every=1, keep=1)
    checkpoints.save(1, saved, {}, force=True)
    checkpoints.close()
    for mesh in meshes:
        shardings = state.shardings(mesh, saved)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved, shardings)
        again, _ = Checkpoints(directory, every=1, keep=1, read_only=True).restore(1, like)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(saved))
        assert jax.tree.map(lambda x: x.sharding, again) == shardings


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    jax.monitoring.register_event_duration_secs_listener(note_compilation)
    jax.config.update("jax_num_cpu_devices", 4 if os.environ.get(hosts.VARIABLE) else 8)
    hosts.join()
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
