"""The losses of the edit stage: the student's on what it makes now, and the fake score's on the same.

Every random draw is made in one place and handed over, so that a test can hand in its own. Networks by name: student
(trained), fake_score (trained), real_score, autoencoder, text_encoder, scorer (frozen). The trained ones come as the
variables that they are applied with: {"params": ...}, and {"lora": ...} beside it where adapters are trained.

Shapes: B batch, H height, W width, C channels, L text tokens, D model width, Q questions per sample, S tokens of a
packed row.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from npedit_jax.models.lora import Variables
from npedit_jax.models.scorer import ScorerOutput
from npedit_jax.objectives import feedback, flow, matching, unroll
from npedit_jax.sampling import Modules, Text, decode, encode_image, encode_text
from npedit_jax.training import steps
from npedit_jax.training.steps import Batch, Metrics, Params, average

PROBES = ("dmd", "scorer")
QUESTIONS = ("edit", "identity")
INSIDE = 1.0 - 1e-4


@dataclasses.dataclass(frozen=True)
class EditSettings:
    """Numbers of the edit stage; the paper's section 3 and appendix, the release where it differs.

    Raises:
      ValueError: times that do not fall from 1.0, or a longer unroll than two steps.
    """

    times: tuple[float, ...]  # the student's times, falling from 1.0
    max_unroll: int = 2  # 1: never a second step
    dmd_weight: float = 1.0
    scorer_weight: float = 0.02
    identity_weight: float = 1.0
    dmd_normalizer: str = "pixel"
    dmd_low: float = 0.02
    dmd_high: float = 0.98
    time_shift: float = 1.0  # of DMD's and the fake score's times
    decoupled: bool = False  # DMD's guidance part at a time and noise of its own (arXiv 2511.22677)
    matching_weight: float = 1.0  # of decoupled DMD's two parts
    guidance_weight: float = 1.0
    guidance_low: float = 0.02  # times of the guidance part; the paper draws them above the student's own
    guidance_high: float = 0.98
    guidance_shift: float = 1.0
    scorer_form: str = "yes_no"
    temperature_start: float = 0.1
    temperature_end: float = 1.0
    temperature_steps: int = 2000
    scorer_clip: bool = False  # pixels beyond [-1, 1] are clipped for the scorer, yet keep their gradient
    scorer_noise: float = 0.0  # standard deviation of the noise on the pixels that the scorer sees, in [-1, 1] units
    ema: float = 0.999
    skip_norm: float = 300.0
    accumulate: int = 1  # parts of a batch whose gradients are taken one after the other, in the memory of one
    frozen: tuple[str, ...] = ("x_pad_token", "cap_pad_token")  # parameters of student and fake score left as they are

    def __post_init__(self) -> None:
        unroll.check_times(self.times, "step.times")
        if self.max_unroll not in (1, 2):
            raise ValueError(f"step.max_unroll must be 1 or 2, found {self.max_unroll}")
        for name, known in (("scorer_form", feedback.FORMS), ("dmd_normalizer", matching.NORMALIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"step.{name} must be one of {known}, found {getattr(self, name)!r}")
        for part in ("dmd", "guidance"):
            low, high = getattr(self, f"{part}_low"), getattr(self, f"{part}_high")
            if not 0.0 <= low < high <= 1.0:
                raise ValueError(f"step.{part}_low and {part}_high must rise within 0 and 1, found {low} and {high}")
        if self.accumulate < 1:
            raise ValueError(f"step.accumulate must be 1 or more, found {self.accumulate}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps that the unroll may have."""
        return (1,) if self.max_unroll == 1 or len(self.times) == 1 else (1, 2)


class StudentDraws(NamedTuple):
    """What one student sample needs: the start, and the second step's time and noise."""

    noise: jax.Array  # [B, H, W, C]
    second_time: jax.Array  # [B]
    second_noise: jax.Array  # [B, H, W, C]


class LossDraws(NamedTuple):
    """What the losses on a student sample need: time and noise of the score networks, noise on the scorer's pixels."""

    time: jax.Array  # [B]
    noise: jax.Array  # [B, H, W, C]
    pixel_rng: jax.Array | None
    guidance_time: jax.Array | None = None  # [B], of decoupled DMD only
    guidance_noise: jax.Array | None = None  # [B, H, W, C]


Draws = tuple[StudentDraws, LossDraws]


class Conditions(NamedTuple):
    """What the networks are given beside the latents, none of it with a gradient."""

    pixels: jax.Array  # the reference image [B, height, width, 3] in [-1, 1]
    reference: jax.Array  # its latents [B, H, W, C]
    instruction: Text
    caption: Text  # of the edited image
    negative: Text  # one prompt for the whole batch, [1, L, D]


def draw_student(rng: jax.Array, shape: tuple[int, ...], times: tuple[float, ...]) -> StudentDraws:
    """Draws the noises and, per sample, which of the later times the second step starts from."""
    noise_rng, time_rng, second_rng = jax.random.split(rng, 3)
    later = jnp.asarray(times[1:] or times, jnp.float32)
    index = jax.random.randint(time_rng, (shape[0],), 0, later.shape[0])
    return StudentDraws(jax.random.normal(noise_rng, shape), later[index], jax.random.normal(second_rng, shape))


def draw(rng: jax.Array, shape: tuple[int, ...], settings: EditSettings, *, low: float, high: float) -> Draws:
    """All draws of one update; the score networks' times are drawn from [low, high), then shifted."""
    student_rng, time_rng, noise_rng, pixel_rng, *guidance_rngs = jax.random.split(rng, 6)
    time = flow.uniform_times(time_rng, shape[0], low, high, settings.time_shift)
    losses = LossDraws(time, jax.random.normal(noise_rng, shape), pixel_rng)
    if settings.decoupled:
        bounds = (settings.guidance_low, settings.guidance_high, settings.guidance_shift)
        losses = losses._replace(
            guidance_time=flow.uniform_times(guidance_rngs[0], shape[0], *bounds),
            guidance_noise=jax.random.normal(guidance_rngs[1], shape),
        )
    return draw_student(student_rng, shape, settings.times), losses


def draw_two_steps(rng: jax.Array, settings: EditSettings) -> jax.Array:
    """One draw per outer step: whether the unroll has a second step, with probability (K - 1) / K."""
    if settings.lengths == (1,):
        return jnp.asarray(False)
    return jax.random.uniform(rng) >= 1.0 / len(settings.times)


def conditions(modules: Modules, frozen: Mapping[str, Params], batch: Batch) -> Conditions:
    """Encodes the reference, the instruction, the edited image's caption and the negative prompt."""
    pixels, reference = encode_image(modules, frozen, batch["reference"])
    # One call for both texts of a sample: the encoder is compiled once for them.
    ids, mask = (
        jnp.concatenate([batch[f"{kind}_{part}"] for kind in ("instruction", "caption")]) for part in ("ids", "mask")
    )
    both = encode_text(modules, frozen, ids, mask)
    instruction, caption = zip(*(jnp.split(x, 2) for x in both), strict=True)
    negative = encode_text(modules, frozen, batch["negative_ids"], batch["negative_mask"])
    return jax.lax.stop_gradient(Conditions(pixels, reference, instruction, caption, negative))


def edit(modules: Modules, student: Variables, given: Conditions, draws: StudentDraws, *, two_steps: bool) -> jax.Array:
    """The student's x0 [B, H, W, C] after one or two unrolled steps; gradients flow through both."""

    def velocity(x_t, t):
        return modules["student"].apply(student, x_t, t, *given.instruction, given.reference)

    times = [jnp.ones_like(draws.second_time)] + [draws.second_time] * two_steps
    return unroll.sample(velocity, draws.noise, times, [draws.second_noise] * two_steps)


def dmd_loss(
    modules: Modules,
    real: Params,
    fake: Variables,
    x0: jax.Array,
    given: Conditions,
    guidance: jax.Array,
    draws: LossDraws,
    settings: EditSettings,
) -> jax.Array:
    """DMD's loss [B] on x0, from the guided real score and the fake score; `x0` alone gets a gradient."""
    fixed, t = jax.lax.stop_gradient(x0), draws.time
    x_t = flow.add_noise(fixed, draws.noise, t)
    negative = jax.tree.map(lambda x: jnp.broadcast_to(x, (x0.shape[0], *x.shape[1:])), given.negative)
    queries = [(x_t, t, given.caption)]
    if settings.decoupled:
        t_guidance = draws.guidance_time
        x_guidance = flow.add_noise(fixed, draws.guidance_noise, t_guidance)
        queries += [(x_guidance, t_guidance, given.caption), (x_guidance, t_guidance, negative)]
    else:
        queries += [(x_t, t, negative)]
    # All in one call: the frozen network runs once, at two or three times the batch.
    noisy, times, text = jax.tree.map(lambda *parts: jnp.concatenate(parts), *queries)
    velocities = jnp.split(modules["real_score"].apply({"params": real}, noisy, times, *text), len(queries))
    fake_x0 = flow.clean_from_velocity(x_t, modules["fake_score"].apply(fake, x_t, t, *given.caption), t)
    if not settings.decoupled:
        real_x0 = flow.clean_from_velocity(x_t, matching.guide(*velocities, guidance), t)
        return matching.matching_loss(x0, real_x0, fake_x0, normalizer=settings.dmd_normalizer)
    difference = flow.expand((1.0 - guidance) * t_guidance, x0) * (velocities[1] - velocities[2])
    return matching.decoupled_loss(
        x0,
        flow.clean_from_velocity(x_t, velocities[0], t),
        fake_x0,
        difference,
        matching_weight=settings.matching_weight,
        guidance_weight=settings.guidance_weight,
        normalizer=settings.dmd_normalizer,
    )


def answers(modules: Modules, params: Params, reference: jax.Array, edited: jax.Array, batch: Batch) -> ScorerOutput:
    """The scorer's output on (reference, edit); the vision tower is differentiated for the edit only."""
    scorer, variables = modules["scorer"], {"params": params}
    first = jax.lax.stop_gradient(scorer.apply(variables, reference[:, None], method="encode_images"))
    second = scorer.apply(variables, edited[:, None], method="encode_images")
    table = jnp.concatenate([first, second], axis=1)
    return steps.answer(scorer, params, table, batch)


def student_loss(
    student: Variables,
    fake: Variables,
    frozen: Mapping[str, Params],
    modules: Modules,
    batch: Batch,
    given: Conditions,
    draws: Draws,
    step: jax.Array,
    settings: EditSettings,
    *,
    two_steps: bool,
    probes: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, Metrics]:
    """The student's total loss and its parts, each a mean over the batch; see `finish_metrics`.

    `probes` are zeros like x0, added to what DMD and the scorer see: their gradients are those of each loss in x0.
    `batch["weight"]` leaves out records that could not be read; loss weights per sample come with the batch.
    """
    student_draws, loss_draws = draws
    x0 = edit(modules, student, given, student_draws, two_steps=two_steps)
    probes = probes or {name: 0.0 for name in PROBES}
    weight = batch["weight"]
    identity = batch["identity_weight"] * jnp.mean(jnp.square(x0 - given.reference), axis=(1, 2, 3))
    losses = settings.identity_weight * identity
    metrics = {"loss/identity": average(identity, weight)}
    if settings.dmd_weight:
        rest = (given, batch["guidance"], loss_draws, settings)
        dmd = dmd_loss(modules, frozen["real_score"], fake, x0 + probes["dmd"], *rest)
        losses += settings.dmd_weight * batch["dmd_weight"] * dmd
        metrics["loss/dmd"] = average(dmd, weight)
    if settings.scorer_weight:
        scorer, scorer_metrics = scorer_loss(
            modules, frozen, x0 + probes["scorer"], batch, given, loss_draws.pixel_rng, step, settings
        )
        losses += settings.scorer_weight * scorer
        metrics |= scorer_metrics
    total = average(losses, weight)
    return total, metrics | {"loss": total}


def scorer_loss(
    modules: Modules,
    frozen: Mapping[str, Params],
    x0: jax.Array,
    batch: Batch,
    given: Conditions,
    pixel_rng: jax.Array | None,
    step: jax.Array,
    settings: EditSettings,
) -> tuple[jax.Array, Metrics]:
    """The scorer's loss [B] on the decoded x0, and what `finish_metrics` makes shares of right answers from."""
    decoded = decode(modules, frozen, x0)
    if settings.scorer_noise:
        decoded = decoded + settings.scorer_noise * jax.random.normal(pixel_rng, decoded.shape)
    if settings.scorer_clip:
        # A saturated colour often decodes beyond the range, where the scorer's own clip would stop its gradient; its
        # clip passes only half of a gradient on the bound itself.
        decoded += jax.lax.stop_gradient(jnp.clip(decoded, -INSIDE, INSIDE) - decoded)
    output = answers(modules, frozen["scorer"], given.pixels, decoded, batch)
    scale = feedback.temperature(step, settings.temperature_start, settings.temperature_end, settings.temperature_steps)
    wanted, weight_BQ = batch["answer"], batch["question_weight"]
    loss = feedback.answer_loss(
        output.logits, output.logsumexp, wanted, weight_BQ, scale=scale, form=settings.scorer_form
    )
    right_BQ = feedback.right_probability(output.logits, wanted)
    metrics = {"loss/scorer": average(loss, batch["weight"])}
    for number, question in enumerate(QUESTIONS):
        asked = weight_BQ[:, number]
        metrics[f"scorer/{question}"] = average(asked * right_BQ[:, number], batch["weight"])
        metrics[f"asked/{question}"] = average(asked, batch["weight"])
    return loss, metrics


def finish_metrics(metrics: Metrics) -> Metrics:
    """With `scorer/edit` and `scorer/identity` as the mean probability given to the wanted answers, where asked.

    Until then each is a mean over the samples of a batch, and so that of its parts. NaN where nothing was asked.
    """
    shares = {
        f"scorer/{q}": metrics[f"scorer/{q}"] / metrics[f"asked/{q}"] for q in QUESTIONS if f"asked/{q}" in metrics
    }
    return {name: value for name, value in metrics.items() if not name.startswith("asked/")} | shares


def fake_score_loss(
    fake: Variables,
    student: Variables,
    modules: Modules,
    batch: Batch,
    given: Conditions,
    draws: Draws,
    *,
    two_steps: bool,
) -> jax.Array:
    """Flow matching of the fake score on a fresh sample of the student (arXiv 2405.14867, section 4.2)."""
    student_draws, loss_draws = draws
    x0 = jax.lax.stop_gradient(edit(modules, student, given, student_draws, two_steps=two_steps))
    x_t = flow.add_noise(x0, loss_draws.noise, loss_draws.time)
    velocity = modules["fake_score"].apply(fake, x_t, loss_draws.time, *given.caption)
    return average(flow.velocity_loss(velocity, x0, loss_draws.noise), batch["weight"])
