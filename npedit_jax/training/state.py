"""What a training run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from npedit_jax import parallel
from npedit_jax.training import optimizer


class TrainState(flax.struct.PyTreeNode):
    """Parameters by network name, each with its optimizer state; an average of those that are kept for use.

    `skipped` counts, per network, the updates left out because their gradient was not finite or too large.
    """

    step: jax.Array
    params: dict[str, Any]
    optimizer: dict[str, Any]
    ema: dict[str, Any]
    skipped: dict[str, jax.Array]


def create(
    params: dict[str, Any], rules: dict[str, optax.GradientTransformation], averaged: tuple[str, ...]
) -> TrainState:
    """Starts a run at step 0; the averages start at the parameters."""
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        optimizer={name: rules[name].init(params[name]) for name in params},
        ema={name: jax.tree.map(jnp.copy, params[name]) for name in averaged},
        skipped={name: jnp.zeros([], jnp.int32) for name in params},
    )


def shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where each array of a state (or of its shapes) lies: moments and averages as the parameter that they are of."""
    by_network = lambda place, trees: {name: place(mesh, tree) for name, tree in trees.items()}  # noqa: E731
    return TrainState(
        step=parallel.replicated(mesh),
        params=by_network(parallel.parameter_shardings, state.params),
        optimizer=by_network(parallel.optimizer_shardings, state.optimizer),
        ema=by_network(parallel.parameter_shardings, state.ema),
        skipped=dict.fromkeys(state.skipped, parallel.replicated(mesh)),
    )


def apply_gradients(
    state: TrainState,
    name: str,
    gradients: Any,
    rule: optax.GradientTransformation,
    *,
    skip_norm: float = float("inf"),
    frozen: tuple[str, ...] = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates one network, guarded; the step count and the averages are left to `finish_step`.

    Parameters whose last name is among `frozen` stay as they are, and their gradient does not count in the norm.
    """
    gradients = jax.tree_util.tree_map_with_path(
        lambda path, g: jnp.zeros_like(g) if path[-1].key in frozen else g, gradients
    )
    update = optimizer.guarded_update(rule, state.params[name], state.optimizer[name], gradients, skip_norm=skip_norm)
    kept = jax.tree_util.tree_map_with_path(
        # Weight decay moves a parameter without a gradient.
        lambda path, new, old: old if path[-1].key in frozen else new,
        update.params,
        state.params[name],
    )
    state = state.replace(
        params=state.params | {name: kept},
        optimizer=state.optimizer | {name: update.optimizer},
        skipped=state.skipped | {name: state.skipped[name] + update.skipped},
    )
    return state, {f"gradient_norm/{name}": update.norm, f"skipped/{name}": state.skipped[name]}


def finish_step(state: TrainState, ema_decay: float) -> TrainState:
    """Counts the step and moves the averages."""
    ema = {
        name: optimizer.ema_update(average, state.params[name], ema_decay, state.step)
        for name, average in state.ema.items()
    }
    return state.replace(step=state.step + 1, ema=ema)
