"""The networks of a run, from a config's `networks`: built and initialised, or loaded with their weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath

from npedit_jax import weights
from npedit_jax.weights import kinds
from npedit_jax.weights.loading import read_config

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


def initialise(kind: str, module: nn.Module, rng: jax.Array) -> Any:
    """Fresh parameters of a module."""
    inputs = [jnp.zeros(x.shape, x.dtype) for x in kinds.example_inputs(kind, module)]
    return jax.jit(module.init)(rng, *inputs)["params"]


def shapes(kind: str, module: nn.Module) -> Any:
    """The tree of a module's parameters, shapes only."""
    return jax.eval_shape(module.init, jax.random.key(0), *kinds.example_inputs(kind, module))["params"]


def module_of(spec: Mapping[str, Any]) -> nn.Module:
    """The module of a config's network, without any weights."""
    architecture = read_config(resolve(spec["directory"])) if spec["directory"] else plain(spec["architecture"])
    return weights.build(spec["kind"], architecture, **dict(spec["options"]))


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
            f"network of kind {spec['kind']!r}: give either a directory with weights or an architecture to start from"
        )
    if directory:
        return Network(*weights.load(spec["kind"], resolve(directory), dtype=dtype, **options))
    module = module_of(spec)
    return Network(module, initialise(spec["kind"], module, rng))


def plain(config: Any) -> Any:
    """ConfigDicts and tuples as the dictionaries and lists that a config.json holds."""
    if isinstance(config, Mapping) or hasattr(config, "items"):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list | tuple) else config
