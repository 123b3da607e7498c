"""The programs of a run with the shapes of their arguments, for compiling and counting without weights or data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from npedit_jax import flops, parallel
from npedit_jax.training import datasets, previews, stages, state
from npedit_jax.training.networks import Network

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Compilable:
    """One program, its arguments, and how often an outer step of the run runs it.

    Attributes:
      function: jitted.
      plain: the same without rematerialisation or kernels, to be counted.
      batch: what of the arguments is no part of the run's state.
      runs: expected runs in an outer step; 0 for what is no part of it.
    """

    function: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: tuple[Any, ...]
    batch: Any
    runs: float


@dataclasses.dataclass(frozen=True)
class Resident:
    """What lies on the devices throughout a run: the train state and the frozen networks, with shardings."""

    state: state.TrainState
    frozen: dict[str, Any]

    def bytes_per_device(self) -> int:
        """Of one device's shards."""
        return shard_bytes((self.state, self.frozen))


def shard_bytes(tree: Any) -> int:
    """Bytes of the parts of arrays that lie in one device's memory."""
    here = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)


def resident(config: Config, mesh: Mesh) -> tuple[dict[str, Network], Resident]:
    """The networks of a config, shapes only, and what a run keeps on the devices of the mesh."""
    made = stages.abstract_networks(config)
    trained = {name: made[name].params for name in config.optimizer}
    start = jax.eval_shape(lambda params: state.create(params, stages.rules(config), stages.averaged(config)), trained)
    frozen = {name: network.params for name, network in made.items() if name not in trained}
    where = stages.offload(config)
    of_state = stages.state_shardings(mesh, start, where)
    return made, Resident(_placed(start, of_state), _placed(frozen, stages.frozen_shardings(mesh, frozen, where)))


def programs(config: Config, mesh: Mesh, side: tuple[int, int]) -> tuple[dict[str, Compilable], Resident]:
    """The programs of a run of the edit stage or the warm-up, by name.

    Args:
      side: height and width of the pictures, a bucket of the config.

    Raises:
      ValueError: another stage.
    """
    if config.stage not in ("npedit", "warmup"):
        raise ValueError(f"programs of stage {config.stage!r} are not laid out here; give a config of npedit or warmup")
    made, held = resident(config, mesh)
    params = {name: network.params for name, network in made.items()}
    modules = {name: network.module for name, network in made.items()}
    plain_modules = {name: flops.plain(module) for name, module in modules.items()}
    runs = stages.expected_runs(config)
    leading = int(datasets.inner_batches(config) > 0)
    batch = {name: _array(mesh, name, x, leading) for name, x in batch_shapes(config, side).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=parallel.replicated(mesh))
    plain = stages.step_functions(config, plain_modules)
    found = {}
    for name, function in stages.programs(config, params, modules, mesh).items():
        inner = _one_of(mesh, batch) if name != "step" else batch
        arguments = (held.state, held.frozen, inner, key)
        found[name] = Compilable(function, plain[name], arguments, inner, runs[name])
    sample = _sample(config, modules, plain_modules, mesh, held, batch)
    return found | {"sample": sample, "notes": _notes(modules, plain_modules, mesh, sample)}, held


def _sample(
    config: Config, modules: Mapping[str, Any], plain: Mapping[str, Any], mesh: Mesh, held: Resident, batch: Any
) -> Compilable:
    """The sampler as the previews run it."""
    program = previews.program(config, modules, stages.adapted(config), mesh)
    inner = _one_of(mesh, batch) if config.stage == "npedit" else batch
    params = held.frozen | held.state.ema
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=parallel.replicated(mesh))
    counted = previews.function(config, plain, stages.adapted(config))
    return Compilable(program, counted, (params, inner, key), inner, 0.0)


def _notes(modules: Mapping[str, Any], plain: Mapping[str, Any], mesh: Mesh, sample: Compilable) -> Compilable:
    """What the previews tell beside the sampler's pictures, the scorer's answers among it."""
    params, inner, _ = sample.arguments
    whole = parallel.replicated(mesh)
    made = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in jax.eval_shape(sample.plain, *sample.arguments)
    ]
    counted = functools.partial(previews.notes, plain)
    return Compilable(previews.notes_program(modules, mesh), counted, (params, inner, made), inner, 0.0)


def batch_shapes(config: Config, side: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of a batch of the edit stage or of the warm-up, all hosts' samples, as `data.pipeline` makes them."""
    edits = config.stage == "npedit"
    leading = (config.fake_updates + 1, config.batch_size) if edits else (config.batch_size,)
    array = lambda shape, dtype: jax.ShapeDtypeStruct((*leading, *shape), dtype)  # noqa: E731
    text = lambda name, lead=leading: {  # noqa: E731
        f"{name}_ids": jax.ShapeDtypeStruct((*lead, config.data.text_length), jnp.int32),
        f"{name}_mask": jax.ShapeDtypeStruct((*lead, config.data.text_length), bool),
    }
    found = {"reference": array((*side, 3), jnp.uint8), "weight": array((), jnp.float32)} | text("caption")
    if not edits:
        return found
    names = ("guidance", "dmd_weight", "identity_weight")
    found |= text("instruction") | text("negative", (leading[0], 1)) | {name: array((), jnp.float32) for name in names}
    found |= {"answer": array((2,), jnp.int32), "question_weight": array((2,), jnp.float32)}
    packed = config.data.options.get("packed_length", 0)
    if packed:
        fields = ("packed_ids", "packed_positions", "packed_segments", "packed_image_index")
        return found | {name: array((packed,), jnp.int32) for name in fields} | {"answer_place": array((2,), jnp.int32)}
    asked = array((2, config.data.question_length), jnp.int32)
    mask = array((2, config.data.question_length), bool)
    return found | {"question_ids": asked, "image_index": asked, "question_mask": mask}


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _array(mesh: Mesh, name: str, x: jax.ShapeDtypeStruct, leading_axes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.field_sharding(mesh, name, leading_axes))


def _one_of(mesh: Mesh, batches: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """One of the inner batches."""
    one = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batches.items()}
    return {name: _array(mesh, name, x, 0) for name, x in one.items()}
