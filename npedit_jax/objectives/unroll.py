"""The few-step sampler: one function for the training unroll (one or two steps) and for inference (all steps)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from npedit_jax.objectives import flow

SAMPLERS = ("fresh", "ddim")


def check_times(times: Sequence[float], name: str) -> None:
    """Raises ValueError, with the name of what has them, where the times do not fall from 1.0 and stay above 0."""
    times = list(times)
    if not times or times[0] != 1.0 or not times[-1] > 0.0 or sorted(set(times), reverse=True) != times:
        raise ValueError(f"{name} must fall from 1.0 and stay above 0, found {tuple(times)}")


def sample(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise_BHWC: jax.Array,
    times: Sequence[jax.Array],
    fresh_noise: Sequence[jax.Array],
    *,
    sampler: str = "fresh",
    eta: float = 1.0,
) -> jax.Array:
    """Visits the given times from noise to clean and returns the last prediction of x0; differentiable throughout.

    Args:
      velocity: `(x_t [B, H, W, C], t [B]) -> v [B, H, W, C]`.
      noise_BHWC: the start, standard normal.
      times: [B] each, falling; the first is 1.
      fresh_noise: standard normal, one [B, H, W, C] for every step after the first.
      sampler: "fresh" noises x0 again with fresh noise; "ddim" keeps part of the noise that the prediction implies.
      eta: "ddim" only: 0 is deterministic, 1 replaces as much noise as the step allows.

    Raises:
      ValueError: unknown sampler, or not one fresh noise per further step.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {SAMPLERS}")
    if len(fresh_noise) != len(times) - 1:
        raise ValueError(f"{len(times)} times need {len(times) - 1} fresh noises, got {len(fresh_noise)}")
    x_t, t_B = noise_BHWC, times[0]
    for next_t_B, fresh in zip(times[1:], fresh_noise, strict=True):
        v = velocity(x_t, t_B)
        x0 = flow.clean_from_velocity(x_t, v, t_B)
        if sampler == "fresh":
            x_t = flow.add_noise(x0, fresh, next_t_B)
        else:
            x_t = _ddim(x0, flow.noise_from_velocity(x_t, v, t_B), fresh, t_B, next_t_B, eta)
        t_B = next_t_B
    return flow.clean_from_velocity(x_t, velocity(x_t, t_B), t_B)


def _ddim(
    x0: jax.Array, eps: jax.Array, fresh: jax.Array, t_B: jax.Array, next_t_B: jax.Array, eta: float
) -> jax.Array:
    """From time t to t': `(1 - t') x0 + b eps + sqrt(t'^2 - b^2) fresh`, `b = max(0, t' - eta (t - t') t' / t)`."""
    t, s = flow.expand(t_B, x0), flow.expand(next_t_B, x0)
    kept = jnp.maximum(0.0, s - eta * (t - s) * s / t)
    return (1.0 - s) * x0 + kept * eps + jnp.sqrt(jnp.maximum(0.0, s * s - kept * kept)) * fresh
