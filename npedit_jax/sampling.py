"""Pictures from trained networks: edits by the student, images by the base model. Pure functions for jax.jit.

Shapes: B batch, H height, W width, C channels, L text tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from npedit_jax.objectives import flow, matching, unroll
from npedit_jax.pixels import to_pixels

Params = Any
Modules = Mapping[str, nn.Module]
NetworkParams = Mapping[str, Params]  # by the name of the network, as the modules
Text = tuple[jax.Array, jax.Array]  # hidden states [B, L, D] and mask [B, L]


def check(*, times: Sequence[float], sampler: str = "ddim", eta: float = 1.0) -> None:
    """Raises ValueError where `edit` cannot take these settings."""
    unroll.check_times(times, "sampling.times")
    if sampler not in unroll.SAMPLERS:
        raise ValueError(f"sampling.sampler must be one of {unroll.SAMPLERS}, found {sampler!r}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"sampling.eta must be in 0 to 1, found {eta!r}")


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


def draw(
    modules: Modules,
    params: NetworkParams,
    size: tuple[int, int],
    text: Text,
    negative: Text | None,
    rng: jax.Array,
    *,
    steps: int,
    guidance: float = 1.0,
    time_shift: float,
) -> jax.Array:
    """What the base model draws from text by `steps` deterministic steps of the guided flow.

    Args:
      size: height and width in pixels.
      negative: what the guidance leads away from; None draws without guidance, at half the cost.

    Returns:
      Pixels [B, height, width, 3], about [-1, 1] and not clipped.
    """
    autoencoder, count = modules["autoencoder"], len(text[0])
    shape = (count, *(side // autoencoder.downscale for side in size), autoencoder.latent_channels)
    times = flow.shift_time(jnp.linspace(1.0, 0.0, steps + 1), time_shift)
    texts = [text] if negative is None else [text, negative]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *texts)

    def advance(x_t, pair_of_times):
        t, after = pair_of_times
        times = jnp.full((len(texts) * count,), t)
        found = modules["denoiser"].apply(
            {"params": params["denoiser"]}, jnp.concatenate([x_t] * len(texts)), times, *joined
        )
        velocity = found if negative is None else matching.guide(*jnp.split(found, 2), jnp.full((count,), guidance))
        return x_t + (after - t) * velocity, None

    latents, _ = jax.lax.scan(advance, jax.random.normal(rng, shape), (times[:-1], times[1:]))
    return decode(modules, params, latents)


def encode_text(modules: Modules, params: NetworkParams, ids: jax.Array, mask: jax.Array) -> Text:
    """Hidden states of the text encoder, with the mask that goes along."""
    return modules["text_encoder"].apply({"params": params["text_encoder"]}, ids, mask), mask


def encode_image(modules: Modules, params: NetworkParams, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pixels in [-1, 1] of uint8 images [B, height, width, 3], and their latents [B, H, W, C]."""
    pixels = to_pixels(image)
    return pixels, modules["autoencoder"].apply({"params": params["autoencoder"]}, pixels, method="encode")


def decode(modules: Modules, params: NetworkParams, latents: jax.Array) -> jax.Array:
    """Pixels [B, height, width, 3] of latents, about [-1, 1] and not clipped."""
    return modules["autoencoder"].apply({"params": params["autoencoder"]}, latents, method="decode")
