"""Low-rank adapters (LoRA, arXiv 2106.09685): `y = x W + scale (x A) B` on chosen linear layers, W frozen.

Adapters are a tree of their own, like the parameters but for `{"a": [in, rank], "b": [rank, out]}` in the place of a
layer's kernel and bias, with a leading layer axis where the layer is stacked. A network reads them from the variable
collection "lora", one layer of a stack at a time: no merged kernel exists, and no gradient of W is ever computed. One
frozen W so serves every network that differs in its adapters only.

`b` starts at zero: a network with fresh adapters computes exactly what it does without.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

COLLECTION = "lora"

Params = Any
Adapters = Any
Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A network of which only the adapters are trained.

    Attributes:
      base: name of the frozen network whose parameters the adapters lie on; others may share it.
      alpha: the adapters' output counts alpha / rank.
    """

    base: str
    alpha: float

    def variables(self, frozen: Mapping[str, Params], adapters: Adapters) -> Variables:
        """What the network is applied with, given all frozen parameters by name."""
        return variables(frozen[self.base], adapters, self.alpha)


class Dense(nn.Dense):
    """A linear layer that adds its adapter's output where there is one."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        outputs = super().__call__(inputs)
        if not self.has_variable(COLLECTION, "a"):
            return outputs
        a, b = (self.get_variable(COLLECTION, name).astype(outputs.dtype) for name in ("a", "b"))
        return outputs + (inputs.astype(outputs.dtype) @ a) @ b


def targets(base: Params, patterns: Sequence[str]) -> dict[str, Any]:
    """The kernels that patterns choose, by the "/"-joined path of their layer.

    Args:
      base: parameters, or their shapes.
      patterns: shell-style, over paths such as "layers/attention/query"; "*" also runs over "/".

    Raises:
      ValueError: a pattern chooses nothing.
    """
    flat = flax.traverse_util.flatten_dict(base, sep="/")
    kernels = {path.removesuffix("/kernel"): leaf for path, leaf in flat.items() if path.endswith("/kernel")}
    if idle := [pattern for pattern in patterns if not fnmatch.filter(kernels, pattern)]:
        raise ValueError(f"LoRA targets {idle} choose no linear layer; layers are {sorted(kernels)}")
    return {path: leaf for path, leaf in kernels.items() if any(fnmatch.fnmatch(path, p) for p in patterns)}


def create(rng: jax.Array, base: Params, *, rank: int, patterns: Sequence[str]) -> Adapters:
    """Fresh adapters, float32: `a` uniform within 1 / sqrt(in) as in PEFT, `b` zero.

    Args:
      base: parameters that the adapters lie on, or their shapes.
      rank: of the product `a b`; parameters per layer are rank (in + out).
      patterns: as in `targets`.

    Raises:
      ValueError: a rank below 1, or a pattern that chooses nothing.
    """
    if rank < 1:
        raise ValueError(f"LoRA needs a rank of at least 1, found {rank}")
    flat = {}
    for number, (path, kernel) in enumerate(sorted(targets(base, patterns).items())):
        *layers, inputs, outputs = kernel.shape
        bound = inputs**-0.5
        key = jax.random.fold_in(rng, number)
        flat[f"{path}/a"] = jax.random.uniform(key, (*layers, inputs, rank), minval=-bound, maxval=bound)
        flat[f"{path}/b"] = jnp.zeros((*layers, rank, outputs))
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def scaled(adapters: Adapters, alpha: float) -> Adapters:
    """The same adapters with the scale, alpha / rank, multiplied into `b`."""
    flat = flax.traverse_util.flatten_dict(adapters, sep="/")
    return flax.traverse_util.unflatten_dict(
        {path: leaf if path.endswith("/a") else leaf * (alpha / leaf.shape[-2]) for path, leaf in flat.items()}, sep="/"
    )


def variables(base: Params, adapters: Adapters, alpha: float) -> Variables:
    """What a network whose linear layers are `Dense` is applied with; differentiable in the adapters alone."""
    return {"params": jax.lax.stop_gradient(base), COLLECTION: scaled(adapters, alpha)}


def merged(params: Mapping[str, Params], adapted: Mapping[str, Adapted]) -> dict[str, Params]:
    """Parameters of all networks by name, those of adapted ones (given as their adapters) whole: base and adapters."""
    return {**params} | {name: merge(params[a.base], params[name], a.alpha) for name, a in adapted.items()}


def merge(base: Params, adapters: Adapters, alpha: float) -> Params:
    """Parameters of a network without adapters that computes the same: `W + scale A B`, in W's type.

    Raises:
      ValueError: adapters of a layer that the base does not have.
    """
    flat = flax.traverse_util.flatten_dict(base, sep="/")
    pairs = flax.traverse_util.flatten_dict(scaled(adapters, alpha), sep="/")
    for path in sorted({path.rpartition("/")[0] for path in pairs}):
        kernel = flat.get(f"{path}/kernel")
        if kernel is None:
            raise ValueError(f"adapters of {path!r} do not belong to this network: it has no such linear layer")
        product = jnp.matmul(pairs[f"{path}/a"], pairs[f"{path}/b"], precision="highest")
        flat[f"{path}/kernel"] = (kernel.astype(jnp.float32) + product).astype(kernel.dtype)
    return flax.traverse_util.unflatten_dict(flat, sep="/")
