"""The networks of a run, from a config's `networks`: built and initialised, or loaded with their weights."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from npedit_jax import parallel, weights
from npedit_jax.models import layers, lora
from npedit_jax.weights import adapters, kinds, published
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


def initialise(kind: str, module: nn.Module, rng: jax.Array, mesh: Mesh | None = None) -> Any:
    """Fresh parameters of a module, each part computed on the device of `mesh` that holds it."""

    def make(rng):
        inputs = [jnp.zeros(x.shape, x.dtype) for x in kinds.example_inputs(kind, module)]
        return module.init(rng, *inputs)["params"]

    # The same function for the shapes and for the values: it is traced once.
    shardings = None if mesh is None else parallel.parameter_shardings(mesh, jax.eval_shape(make, rng))
    return parallel.place(make, shardings, rng)


def shapes(kind: str, module: nn.Module) -> Any:
    """The tree of a module's parameters, shapes only."""
    return jax.eval_shape(module.init, jax.random.key(0), *kinds.example_inputs(kind, module))["params"]


def _shardings(kind: str, module: nn.Module, mesh: Mesh | None) -> Any:
    return None if mesh is None else parallel.parameter_shardings(mesh, shapes(kind, module))


def module_of(spec: Mapping[str, Any]) -> nn.Module:
    """The module of a config's network, without any weights.

    Of a published checkpoint not even its directory need be there, see `weights.published`.
    """
    return weights.build(spec["kind"], _architecture(spec), **module_options(spec))


def module_options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a config's network as fields of its module: types as types, not as their names."""
    options = dict(spec["options"])
    return options | {key: jnp.dtype(options[key]) for key in ("dtype", "param_dtype") if key in options}


def _architecture(spec: Mapping[str, Any]) -> dict[str, Any]:
    if not spec["directory"]:
        return plain(spec["architecture"])
    directory = resolve(spec["directory"])
    if not (directory / "config.json").exists() and (known := published.architecture(spec["directory"])):
        return known
    return read_config(directory)


def create(
    spec: Mapping[str, Any], rng: jax.Array | None, mesh: Mesh | None = None, *, as_stored: bool = False
) -> Network:
    """Makes one network of a config.

    Args:
      spec: `kind`, a name that `npedit_jax.weights` knows; `directory`, where its weights are, as on Hugging Face or
        converted, or "" for fresh ones; `architecture`, its config.json as a dictionary, used where there is no
        directory; `options`, fields of the module that are not part of the weights (remat policy, attention
        implementation).
      rng: for fresh weights.
      mesh: over whose devices the parameters are spread, as `parallel.TABLE` says; None is the default device.
      as_stored: leave loaded weights in the types of their files, instead of the one of the module's parameters, which
        is bfloat16 for networks that are frozen on an accelerator.

    Raises:
      ValueError: both or neither of directory and architecture are given.
    """
    options, directory = module_options(spec), spec["directory"]
    if bool(directory) == bool(spec["architecture"]):
        raise ValueError(
            f"network of kind {spec['kind']!r}: give either a directory with weights or an architecture to start from"
        )
    if directory:
        # The module's own `dtype` is that of its computations, `load`'s that of the weights.
        compute = options.pop("dtype", None)
        dtype = None if as_stored else spec["options"].get("param_dtype", "float32")
        shardings = _shardings(spec["kind"], module_of(spec), mesh)
        return Network(
            *weights.load(spec["kind"], resolve(directory), dtype, shardings, compute_dtype=compute, **options)
        )
    module = module_of(spec)
    return Network(module, initialise(spec["kind"], module, rng, mesh))


def on_this_machine(network: Network) -> Network:
    """The network to be used outside a run: with attention for this machine's devices, whatever the run had."""
    return Network(layers.runnable(network.module, jax.default_backend()), network.params)


def adapt(
    spec: Mapping[str, Any],
    base: Mapping[str, Any],
    rng: jax.Array,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    start: str,
    mesh: Mesh | None = None,
) -> Network:
    """Makes a network of which adapters are trained: a module, and the adapters in the place of parameters.

    Args:
      spec: of the network; its directory or architecture is its base's, its options are its own.
      base: the spec of the frozen network that the adapters lie on.
      rng: for fresh adapters.
      rank, alpha, targets: of the adapters, see `lora.create` and `lora.scaled`.
      start: directory of adapters to start from, as `weights.adapters` writes them; "" for fresh ones.
      mesh: as in `create`.

    Raises:
      ValueError: another directory or architecture than the base's, or adapters that do not fit.
    """
    for field in ("kind", "directory", "architecture"):
        own, of_base = json.dumps(plain(spec)[field]), json.dumps(plain(base)[field])
        if own != of_base:
            raise ValueError(
                f"adapters lie on the weights of their base: {field} is {own} for the network and {of_base} for its "
                "base; give both the same"
            )
    module = module_of(spec)
    fresh = functools.partial(lora.create, base=shapes(spec["kind"], module), rank=rank, patterns=targets)
    shapes_of_fresh = jax.eval_shape(fresh, rng)
    shardings = None if mesh is None else parallel.parameter_shardings(mesh, shapes_of_fresh)
    if not start:
        return Network(module, parallel.place(fresh, shardings, rng))
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes_of_fresh)
    made = adapters.load(resolve(start), spec["kind"], module, like=like, alpha=alpha)
    return Network(module, made if mesh is None else parallel.put(made, shardings))


def plain(config: Any) -> Any:
    """ConfigDicts and tuples as the dictionaries and lists that a config.json holds."""
    if isinstance(config, Mapping) or hasattr(config, "items"):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list | tuple) else config
