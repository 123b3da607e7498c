"""FLOPs that a function needs, counted from the shapes of its products before any compiler sees it."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from npedit_jax.models import layers

# What a step needs: nothing is computed twice, and attention is two products.
PLAIN = {"remat": "none", "implementation": "xla"}
# Name scope of products that only put numbers in another order: not needed.
REORDERING = "reordering"


def plain(module: nn.Module) -> nn.Module:
    """The module with `PLAIN` options, in its parts as well: the one to count."""
    return layers.changed(module, lambda name, value: PLAIN.get(name, value))


def useful(function: Callable[..., Any], *arguments: Any) -> float:
    """Of the matrix products and convolutions of `function(*arguments)`, loops counted by their length.

    Of a condition the branch with most products counts. What the results do not depend on is left out, and so is what
    runs on the same data twice: give a function without rematerialisation.
    """
    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def count(jaxpr: Any) -> float:
    """FLOPs of a traced program, see `useful`."""
    needed = {variable for variable in jaxpr.outvars if not hasattr(variable, "val")}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        if not (needed.intersection(equation.outvars) or equation.effects):
            continue
        needed.update(variable for variable in equation.invars if not hasattr(variable, "val"))
        total += _of_equation(equation)
    return total


def _of_equation(equation: Any) -> float:
    name = equation.primitive.name
    inputs = [variable.aval.shape for variable in equation.invars if hasattr(variable.aval, "shape")]
    outputs = [variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape")]
    if name == "dot_general":
        if REORDERING in str(equation.source_info.name_stack):
            return 0.0
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[0][i] for i in contracted)
    if name == "conv_general_dilated":
        # Zeros between the inputs of a transposed convolution are multiplied like all else.
        features = inputs[1][equation.params["dimension_numbers"].rhs_spec[0]]
        groups = equation.params["batch_group_count"]
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[1]) / features / groups
    inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr"))
    bodies = [count(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")]
    if not bodies:
        return 0.0
    repeated = equation.params.get("length", 1) if name == "scan" else 1
    return repeated * (max(bodies) if name == "cond" else sum(bodies))
