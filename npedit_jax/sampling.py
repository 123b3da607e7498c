"""Pictures from trained networks: edits by the student, images by the base model. Pure functions for jax.jit.

Shapes: B batch, H height, W width, C channels, L text tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from npedit_jax.objectives import flow, matching, unroll

Params = Any
Text = tuple[jax.Array, jax.Array]  # hidden states [B, L, D] and mask [B, L]


def edit(
    student: nn.Module,
    params: Params,
    reference: jax.Array,
    instruction: Text,
    keys: jax.Array,
    *,
    times: Sequence[float],
    sampler: str = "ddim",
    eta: float = 1.0,
) -> jax.Array:
    """Edited latents [B, H, W, C] of the reference latents; one network call per time.

    Args:
      keys: a random key per sample, [B]: a sample's noise does not depend on its neighbours.
    """
    draw = jax.vmap(lambda key: jax.random.normal(key, (len(times), *reference.shape[1:])), out_axes=1)
    noises = list(draw(keys))
    times = [jnp.full(reference.shape[:1], t) for t in times]

    def velocity(x_t, t):
        return student.apply({"params": params}, x_t, t, *instruction, reference)

    return unroll.sample(velocity, noises[0], times, noises[1:], sampler=sampler, eta=eta)


def generate(
    denoiser: nn.Module,
    params: Params,
    shape: tuple[int, ...],
    text: Text,
    negative: Text,
    rng: jax.Array,
    *,
    steps: int,
    guidance: float,
    time_shift: float,
) -> jax.Array:
    """Latents of the given shape [B, H, W, C] from text by `steps` deterministic steps of the guided flow."""
    times = flow.shift_time(jnp.linspace(1.0, 0.0, steps + 1), time_shift)
    pair = jax.tree.map(lambda positive, other: jnp.concatenate([positive, other]), text, negative)
    scale = jnp.full(shape[:1], guidance)

    def advance(x_t, pair_of_times):
        t, after = pair_of_times
        both = denoiser.apply({"params": params}, jnp.concatenate([x_t, x_t]), jnp.full((2 * shape[0],), t), *pair)
        velocity = matching.guide(*jnp.split(both, 2), scale)
        return x_t + (after - t) * velocity, None

    return jax.lax.scan(advance, jax.random.normal(rng, shape), (times[:-1], times[1:]))[0]


def encode_text(
    modules: Mapping[str, nn.Module], params: Mapping[str, Params], ids: jax.Array, mask: jax.Array
) -> Text:
    """Hidden states of the text encoder, with the mask that goes along."""
    return modules["text_encoder"].apply({"params": params["text_encoder"]}, ids, mask), mask
