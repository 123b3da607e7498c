"""The networks of a run, from a config's `networks`: built and initialised, or loaded with their weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath

from npedit_jax import weights

PACKAGE = "package:"


class Network(NamedTuple):
    """A module and, where they were loaded or initialised, its parameters."""

    module: nn.Module
    params: Any


def resolve(directory: str) -> epath.Path:
    """The path of a weights directory; "package:NAME" is a directory shipped inside npedit_jax."""
    if directory.startswith(PACKAGE):
        return epath.resource_path("npedit_jax") / directory.removeprefix(PACKAGE)
    return epath.Path(directory)


def example_inputs(kind: str, module: nn.Module) -> tuple[Any, ...]:
    """Small arguments of a module's call, for initialisation and shape evaluation."""
    if kind == "autoencoder":
        side = 2 ** len(module.block_out_channels)
        return (jnp.zeros((1, side, side, module.image_channels)),)
    if kind == "zimage":
        side = 2 * module.patch_size
        latents = jnp.zeros((1, side, side, module.channels))
        return latents, jnp.ones((1,)), jnp.zeros((1, 8, module.text_width)), jnp.ones((1, 8), bool)
    if kind == "qwen3":
        return jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    side = module.vision.image_size
    ids = jnp.zeros((1, 1, 4), jnp.int32)
    return jnp.zeros((1, 1, side, side, 3)), ids, jnp.ones((1, 1, 4), bool), jnp.full((1, 1, 4), -1)


def initialise(kind: str, module: nn.Module, rng: jax.Array) -> Any:
    """Fresh parameters of a module."""
    return jax.jit(module.init)(rng, *example_inputs(kind, module))["params"]


def create(spec: Mapping[str, Any], rng: jax.Array, dtype: str = "float32") -> Network:
    """Makes one network of a config.

    Args:
      spec: `kind`, a name that `npedit_jax.weights` knows; `directory`, where its weights are, or "" for fresh ones;
        `architecture`, its config.json as a dictionary, used where there is no directory; `options`, fields of the
        module that are not part of the weights (remat policy, attention implementation).
      rng: for fresh weights.
      dtype: of loaded weights.

    Raises:
      ValueError: both or neither of directory and architecture are given.
    """
    options, directory = dict(spec["options"]), spec["directory"]
    if bool(directory) == bool(spec["architecture"]):
        raise ValueError(
            f"network of kind {spec['kind']!r}: give a directory with weights or an architecture to start from, not both"
        )
    if directory:
        return Network(*weights.load(spec["kind"], resolve(directory), dtype=dtype, **options))
    module = weights.build(spec["kind"], _plain(spec["architecture"]), **options)
    return Network(module, initialise(spec["kind"], module, rng))


def _plain(config: Any) -> Any:
    """ConfigDicts and tuples as the dictionaries and lists that a config.json holds."""
    if isinstance(config, Mapping) or hasattr(config, "items"):
        return {key: _plain(value) for key, value in config.items()}
    return [_plain(value) for value in config] if isinstance(config, list | tuple) else config
