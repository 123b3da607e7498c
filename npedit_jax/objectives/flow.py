"""Rectified flow: times, noising, and the way between velocity, clean latent and noise.

`t = 0` is clean, `t = 1` is noise; `x_t = (1 - t) x0 + t noise`; the velocity is `v = noise - x0`.
"""

import jax
import jax.numpy as jnp


def expand(t_B: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes [B] to [B, 1, ..., 1] with the rank of `like`."""
    return t_B.reshape(t_B.shape + (1,) * (like.ndim - t_B.ndim))


def add_noise(x0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """Returns `x_t`, the clean latents [B, ...] moved towards the noise by `t_B` in [0, 1]."""
    t = expand(t_B, x0)
    return (1.0 - t) * x0 + t * noise


def clean_from_velocity(x_t: jax.Array, velocity: jax.Array, t_B: jax.Array) -> jax.Array:
    """Returns the x0 that a velocity implies at time `t_B`."""
    return x_t - expand(t_B, x_t) * velocity


def noise_from_velocity(x_t: jax.Array, velocity: jax.Array, t_B: jax.Array) -> jax.Array:
    """Returns the noise that a velocity implies at time `t_B`."""
    return x_t + (1.0 - expand(t_B, x_t)) * velocity


def shift_time(t: jax.Array, shift: float) -> jax.Array:
    """Moves times in [0, 1] towards noise: `s t / (1 + (s - 1) t)`; a shift of 1 leaves them.

    Source: Stable Diffusion 3 (arXiv 2403.03206), equation 23.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def uniform_times(rng: jax.Array, batch: int, low: float = 0.0, high: float = 1.0, shift: float = 1.0) -> jax.Array:
    """Draws [B] times uniform in [low, high), then shifted towards noise."""
    return shift_time(jax.random.uniform(rng, (batch,), minval=low, maxval=high), shift)


def with_endpoint(rng: jax.Array, t_B: jax.Array, probability: float) -> jax.Array:
    """Replaces each time by 1 (pure noise) with the given probability: where a few-step sampler starts."""
    at_end_B = jax.random.uniform(rng, t_B.shape) < probability
    return jnp.where(at_end_B, 1.0, t_B)


def logit_normal_weight(t_B: jax.Array) -> jax.Array:
    """Loss weight per sample that makes uniform times count like logit-normal ones (mean 0, deviation 1).

    Source: Stable Diffusion 3 (arXiv 2403.03206), section 3.1. Zero at both ends.
    """
    t = jnp.clip(t_B, 1e-5, 1.0 - 1e-5)
    logit = jnp.log(t) - jnp.log1p(-t)
    return jnp.exp(-0.5 * jnp.square(logit)) / (jnp.sqrt(2.0 * jnp.pi) * t * (1.0 - t))


def time_weight(t_B: jax.Array) -> jax.Array:
    """Loss weight `t`: half way between the velocity's error (weight 1) and that of x0, which is `t` times as large.

    A network that predicts x0 otherwise spends its first thousands of steps on times near 0, where it only has to copy
    its input, before it learns what the caption says.
    """
    return t_B


def clean_weight(t_B: jax.Array) -> jax.Array:
    """Loss weight `t^2`: the velocity's error times this is the error of the x0 that it implies."""
    return jnp.square(t_B)


LOSS_WEIGHTS = {
    "uniform": jnp.ones_like,
    "logit_normal": logit_normal_weight,
    "time": time_weight,
    "clean": clean_weight,
}


def velocity_loss(velocity: jax.Array, x0: jax.Array, noise: jax.Array) -> jax.Array:
    """Flow matching loss [B]: mean square distance to `noise - x0` over all axes but the batch, float32."""
    error = velocity.astype(jnp.float32) - (noise - x0)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
