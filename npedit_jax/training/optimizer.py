"""Optimizers by name, learning-rate schedules, and the guarded update that skips bad gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

Params = Any
VECTORS = ("scale", "bias")  # names of parameters that are a vector, or a stack of them


class SecondMomentState(NamedTuple):
    """Adam's state when its first moment is the gradient itself."""

    count: jax.Array
    nu: Params


def scale_by_second_moment(b2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam with b1 = 0, without storing the first moment (4 bytes a parameter less than `optax.scale_by_adam`)."""

    def init(params: Params) -> SecondMomentState:
        return SecondMomentState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Params, state: SecondMomentState, params: Params = None) -> tuple[Params, SecondMomentState]:
        del params
        count = optax.safe_increment(state.count)
        nu = jax.tree.map(lambda g, n: (1 - b2) * jnp.square(g) + b2 * n, gradients, state.nu)
        correction = 1 - b2 ** count.astype(jnp.float32)
        updates = jax.tree.map(lambda g, n: g / (jnp.sqrt(n / correction) + epsilon), gradients, nu)
        return updates, SecondMomentState(count, nu)

    return optax.GradientTransformation(init, update)


def schedule(peak: float, end: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine down to `end` at `steps`; `end == peak` stays constant."""
    after = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1), alpha=end / peak if peak else 0.0)
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def _muon_dimensions(params: Params) -> Params:
    """Muon for the matrices, stacked ones layer by layer; Adam for everything else (norms, biases, embeddings)."""

    def dimensions(path: tuple, leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        if path[-1].key != "kernel" or leaf.ndim not in (2, 3):
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _decayed(params: Params) -> Params:
    """True where weight decay acts: not on vectors (norms, biases), as in the NP-Edit release's `utils/optim.py`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in VECTORS, params)


def build(
    name: str,
    *,
    learning_rate: optax.Schedule | float,
    b1: float,
    b2: float,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    adam_factor: float = 1.0,
) -> optax.GradientTransformation:
    """Builds the optimizer of one network.

    Args:
      name: "adam" (AdamW when weight_decay > 0; with b1 = 0 no first moment is stored) or "muon" (Muon on matrices with
        momentum b1, Adam with (b1, b2) on the rest).
      weight_decay: times the learning rate, what is taken off a parameter; "adam" spares vectors.
      clip_norm: global-norm clip before the optimizer; 0 leaves gradients as they are.
      adam_factor: with "muon", the learning rate of what Adam trains over that of the matrices.

    Raises:
      ValueError: unknown name.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    if name == "muon":
        rule = contrib.muon(
            learning_rate,
            beta=b1,
            adam_b1=b1,
            adam_b2=b2,
            adam_learning_rate=_times(learning_rate, adam_factor),
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
        return optax.chain(clip, rule)
    if name != "adam":
        raise ValueError(f"unknown optimizer {name!r}; choose 'adam' or 'muon'")
    moments = optax.scale_by_adam(b1, b2, epsilon) if b1 else scale_by_second_moment(b2, epsilon)
    decay = optax.add_decayed_weights(weight_decay, _decayed) if weight_decay else optax.identity()
    return optax.chain(clip, moments, decay, optax.scale_by_learning_rate(learning_rate))


def _times(rate: optax.Schedule | float, factor: float) -> optax.Schedule | float:
    return (lambda count: factor * rate(count)) if callable(rate) else factor * rate


class Update(NamedTuple):
    """What a guarded update leaves behind."""

    params: Params
    optimizer: optax.OptState
    norm: jax.Array  # global gradient norm before the clip
    skipped: jax.Array  # bool


def guarded_update(
    rule: optax.GradientTransformation,
    params: Params,
    optimizer: optax.OptState,
    gradients: Params,
    *,
    skip_norm: float | jax.Array = jnp.inf,
) -> Update:
    """Applies the gradients, unless their norm is not finite or above `skip_norm`: then nothing changes."""
    norm = optax.global_norm(gradients)
    good = jnp.isfinite(norm) & (norm <= skip_norm)
    safe = jax.tree.map(lambda g: jnp.where(good, g, 0.0), gradients)
    updates, new_optimizer = rule.update(safe, optimizer, params)
    new_params = optax.apply_updates(params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
    return Update(keep(new_params, params), keep(new_optimizer, optimizer), norm, ~good)


def ema_update(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """Exponential moving average over at most about a tenth of the steps so far, until that is what `decay` means.

    So the initial weights are soon forgotten; a decay of 0.999 is in force from step 8,990 on.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
