"""Train steps of the stages before the edit stage: pure functions `(state, frozen, batch, rng) -> (state, metrics)`.

Shapes: B batch, H height, W width, C channels, L text tokens, D model width, Q questions per sample.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from npedit_jax import parallel
from npedit_jax.models import lora
from npedit_jax.models.scorer import ScorerOutput
from npedit_jax.objectives import feedback, flow
from npedit_jax.pixels import to_pixels
from npedit_jax.sampling import Modules, encode_image, encode_text
from npedit_jax.training import accumulation
from npedit_jax.training import state as states

Params = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Rules = Mapping[str, optax.GradientTransformation]
UNPACKED = ("question_ids", "question_mask", "image_index")
PACKED = ("packed_ids", "packed_positions", "packed_segments", "packed_image_index", "answer_place")
Step = Callable[[states.TrainState, Mapping[str, Params], Batch, jax.Array], tuple[states.TrainState, Metrics]]


def compile_step(step: Step, state_shardings: states.TrainState, frozen_shardings: Mapping[str, Any]) -> Step:
    """The step as a program that takes the state over and leaves each array where it was.

    What lies in the hosts' memory is on the devices for as long as the program uses it.
    """
    whole = parallel.replicated(state_shardings.step.mesh)
    return jax.jit(
        lambda state, frozen, *rest: step(parallel.on_devices(state), parallel.on_devices(frozen), *rest),
        donate_argnums=0,
        in_shardings=(state_shardings, frozen_shardings, None, None),
        out_shardings=(state_shardings, whole),
    )


def _train(
    loss: Callable[..., tuple[jax.Array, Metrics]],
    rules: Rules,
    *,
    ema: float,
    skip_norm: float,
    skip_from: int = 0,
    frozen_names: tuple[str, ...] = (),
    accumulate: int = 1,
) -> Step:
    """One gradient step on every trained network of a stage: `loss(params, frozen, batch, rng) -> (loss, metrics)`.

    A gradient norm above `skip_norm` is left out from step `skip_from` on; one that is not finite always is. The
    gradient is taken over `accumulate` parts of the batch, each with a key of its own; a batch cut in parts needs
    `weight`.
    """

    def step(state, frozen, batch, rng):
        def gradient(batch, rng):
            return jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, rng)

        (_, metrics), gradients = accumulation.mean(gradient, batch, batch.get("weight"), rng, accumulate)
        limit = jnp.where(state.step >= skip_from, skip_norm, jnp.inf) if skip_from else skip_norm
        for name, rule in rules.items():
            state, update = states.apply_gradients(
                state, name, gradients[name], rule, skip_norm=limit, frozen=frozen_names
            )
            metrics |= update
        return states.finish_step(state, ema), metrics

    return step


def autoencoder_step(modules: Modules, rules: Rules, *, ema: float, skip_norm: float, kl_weight: float) -> Step:
    """Reconstruction (mean absolute plus mean square error) and a small pull of the latents towards a normal.

    Means over the batch leave out records that could not be read.
    The metrics `latent_mean` and `latent_std` are those of the raw distribution means: what shift and scale should be.
    """
    autoencoder = modules["autoencoder"]

    def loss(params, frozen, batch, rng):
        del frozen
        variables = {"params": params["autoencoder"]}
        pixels = to_pixels(batch["image"])
        mean, logvar = autoencoder.apply(variables, pixels, method="encode_moments")
        raw = mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape)
        latents = (raw - autoencoder.shift_factor) * autoencoder.scaling_factor
        error = autoencoder.apply(variables, latents, method="decode") - pixels

        def over_batch(x):
            return average(jnp.mean(x, axis=(1, 2, 3)), batch["weight"])

        absolute, square = over_batch(jnp.abs(error)), over_batch(jnp.square(error))
        kl = 0.5 * over_batch(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        total = absolute + square + kl_weight * kl
        metrics = {"loss": total, "absolute": absolute, "square": square, "kl": kl}
        return total, metrics | {"latent_mean": jnp.mean(mean), "latent_std": jnp.std(mean)}

    return _train(loss, rules, ema=ema, skip_norm=skip_norm)


def flow_loss(
    denoiser: nn.Module,
    variables: lora.Variables,
    latents: jax.Array,
    text: tuple[jax.Array, jax.Array],
    rng: jax.Array,
    *,
    reference: jax.Array | None = None,
    time_shift: float = 1.0,
    weighting: str = "uniform",
    endpoint: float = 0.0,
) -> jax.Array:
    """Flow matching loss per sample, [B].

    Args:
      variables: what the denoiser is applied with.
      text: hidden states [B, L, D] and their mask [B, L].
      weighting: of the loss over time, a name of `flow.LOSS_WEIGHTS`.
      endpoint: share of samples trained at t = 1, where the few-step sampler starts.
    """
    if weighting not in flow.LOSS_WEIGHTS:
        raise ValueError(f"unknown weighting {weighting!r}; choose one of {list(flow.LOSS_WEIGHTS)}")
    time_rng, end_rng, noise_rng = jax.random.split(rng, 3)
    t = flow.uniform_times(time_rng, latents.shape[0], shift=time_shift)
    if endpoint:
        t = flow.with_endpoint(end_rng, t, endpoint)
    noise = jax.random.normal(noise_rng, latents.shape)
    velocity = denoiser.apply(variables, flow.add_noise(latents, noise, t), t, *text, reference)
    return flow.velocity_loss(velocity, latents, noise) * flow.LOSS_WEIGHTS[weighting](t)


def base_step(
    modules: Modules, rules: Rules, *, ema: float, skip_norm: float, accumulate: int = 1, **flow_settings: Any
) -> Step:
    """Text to image by flow matching; the text encoder learns with the denoiser where it is among the rules."""

    def loss(params, frozen, batch, rng):
        networks = {**frozen, **params}
        _, latents = encode_image(modules, networks, batch["image"])
        text = encode_text(modules, networks, batch["caption_ids"], batch["caption_mask"])
        variables = {"params": networks["denoiser"]}
        losses = flow_loss(modules["denoiser"], variables, latents, text, rng, **flow_settings)
        total = average(losses, batch["weight"])
        return total, {"loss": total}

    return _train(loss, rules, ema=ema, skip_norm=skip_norm, accumulate=accumulate)


def average(x_B: jax.Array, weight_B: jax.Array) -> jax.Array:
    """Weighted mean over the batch, leaving out records that could not be read; 0 where all weights are."""
    return jnp.sum(x_B * weight_B) / jnp.maximum(jnp.sum(weight_B), 1e-6)


def student_flow_step(
    modules: Modules,
    rules: Rules,
    *,
    target: str,
    text: str,
    ema: float,
    skip_norm: float,
    skip_from: int = 0,
    accumulate: int = 1,
    adapted: lora.Adapted | None = None,
    **flow_settings: Any,
) -> Step:
    """Flow matching of the student on known targets.

    Args:
      target: the image to come to: "reference" teaches the student to copy (the warm-up), "target" needs pairs.
      text: what the student is told: "caption" or "instruction".
      skip_from: step from which on a gradient norm above `skip_norm` is skipped.
      accumulate: parts of a batch whose gradients are taken one after the other.
      adapted: where adapters are trained in the place of the student's parameters.
    """

    def loss(params, frozen, batch, rng):
        _, reference = encode_image(modules, frozen, batch["reference"])
        latents = reference if target == "reference" else encode_image(modules, frozen, batch[target])[1]
        told = encode_text(modules, frozen, batch[f"{text}_ids"], batch[f"{text}_mask"])
        losses = flow_loss(
            modules["student"],
            adapted.variables(frozen, params["student"]) if adapted else {"params": params["student"]},
            latents,
            told,
            rng,
            reference=reference,
            **flow_settings,
        )
        total = average(losses, batch["weight"])
        return total, {"loss": total}

    # The pad tokens are the base model's: the student shares them with the score networks.
    pad_tokens = ("x_pad_token", "cap_pad_token")
    options = dict(skip_from=skip_from, frozen_names=pad_tokens, accumulate=accumulate)
    return _train(loss, rules, ema=ema, skip_norm=skip_norm, **options)


def answer(scorer: nn.Module, params: Params, table_BMD: jax.Array, batch: Batch) -> ScorerOutput:
    """The scorer's output on an image table; the questions stand in one packed row where the batch holds one."""
    method, fields = ("answer_packed", PACKED) if "packed_ids" in batch else ("answer", UNPACKED)
    arguments = [batch[field] for field in fields]
    return scorer.apply({"params": params}, table_BMD, *arguments, batch.get("answer_ids"), method=method)


def scorer_step(
    modules: Modules, rules: Rules, *, ema: float, skip_norm: float, roundtrip: float, latent_noise: float
) -> Step:
    """Cross-entropy of the scorer's answers over the whole vocabulary: Yes or No, or a word.

    Args:
      roundtrip: share of the samples whose second image goes through the autoencoder first, with noise on its latents:
        the scorer will judge decoded latents.
      latent_noise: largest standard deviation of that noise.
    """

    def through_autoencoder(params, pixels, rng):
        choice_rng, level_rng, noise_rng = jax.random.split(rng, 3)
        autoencoder = modules["autoencoder"]
        latents = autoencoder.apply({"params": params}, pixels, method="encode")
        level = latent_noise * jax.random.uniform(level_rng, (pixels.shape[0], 1, 1, 1))
        latents = latents + level * jax.random.normal(noise_rng, latents.shape)
        decoded = jnp.clip(autoencoder.apply({"params": params}, latents, method="decode"), -1.0, 1.0)
        chosen = jax.random.uniform(choice_rng, (pixels.shape[0], 1, 1, 1)) < roundtrip
        return jnp.where(chosen, decoded, pixels)

    def loss(params, frozen, batch, rng):
        pixels = to_pixels(batch["images"])
        if roundtrip:
            second = through_autoencoder(frozen["autoencoder"], pixels[:, 1], rng)
            pixels = jnp.stack([pixels[:, 0], second], axis=1)
        table = modules["scorer"].apply({"params": params["scorer"]}, pixels, method="encode_images")
        output = answer(modules["scorer"], params["scorer"], table, batch)
        wanted, weight = batch["answer"], batch["question_weight"]
        losses = feedback.answer_loss(output.logits, output.logsumexp, wanted, weight, form="vocabulary")
        probability = jnp.exp(output.logits[..., 1] - output.logsumexp)
        right = ((probability > 0.5) == (wanted > 0.5)) * weight
        # An answer between Yes and No costs its own entropy at best: without it, 0 is perfect.
        entropy = -(jax.scipy.special.xlogy(wanted, wanted) + jax.scipy.special.xlogy(1 - wanted, 1 - wanted)) * weight
        total = jnp.mean(losses)
        count = jnp.maximum(jnp.sum(weight), 1.0)
        return total, {"loss": total, "right": jnp.sum(right) / count, "entropy": jnp.sum(entropy) / count}

    return _train(loss, rules, ema=ema, skip_norm=skip_norm)
