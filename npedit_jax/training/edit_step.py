"""The edit stage's updates: T - 1 of the fake score, then one of the student, as one program or as separate ones.

Shapes: T inner batches, each of B samples.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from npedit_jax import parallel
from npedit_jax.models import lora
from npedit_jax.sampling import Modules
from npedit_jax.training import accumulation
from npedit_jax.training import state as states
from npedit_jax.training.edit_losses import (
    PROBES,
    Conditions,
    Draws,
    EditSettings,
    conditions,
    draw,
    draw_two_steps,
    fake_score_loss,
    finish_metrics,
    student_loss,
)
from npedit_jax.training.steps import Batch, Metrics, Params, Rules, Step

Length = bool | jax.Array  # whether the unroll has a second step; a Python bool makes a program of that length alone


@dataclasses.dataclass(frozen=True)
class Updates:
    """One fake-score update and one student update, as pure functions.

    Both are `(state, frozen, batch, rng, two_steps) -> (state, metrics)`; the student's also ends the outer step. They
    differentiate what is in the state: parameters, or adapters on a frozen base.

    Attributes:
      adapted: the trained networks of which only adapters are trained.
    """

    modules: Modules
    rules: Rules
    settings: EditSettings
    adapted: Mapping[str, lora.Adapted] = dataclasses.field(default_factory=dict)

    def fake_score(
        self, state: states.TrainState, frozen: Mapping[str, Params], batch: Batch, rng: jax.Array, two_steps: Length
    ) -> tuple[states.TrainState, Metrics]:
        """Fits the fake score to what the student makes of one batch."""
        given = conditions(self.modules, frozen, batch)
        draws = draw(rng, given.reference.shape, self.settings, low=0.0, high=1.0)

        def gradient(fake, student, *, two_steps):
            def loss(fake, batch, given, draws):
                networks = (self._variables("fake_score", fake, frozen), self._variables("student", student, frozen))
                return fake_score_loss(*networks, self.modules, batch, given, draws, two_steps=two_steps)

            return self._mean(lambda *samples: jax.value_and_grad(loss)(fake, *samples), batch, given, draws)

        loss, gradients = _by_length(two_steps, gradient, state.params["fake_score"], state.params["student"])
        state, metrics = self._apply(state, "fake_score", gradients)
        return state, metrics | {"loss/fake_score": loss}

    def student(
        self, state: states.TrainState, frozen: Mapping[str, Params], batch: Batch, rng: jax.Array, two_steps: Length
    ) -> tuple[states.TrainState, Metrics]:
        """Updates the student on one batch, counts the step and moves the averages."""
        given = conditions(self.modules, frozen, batch)
        draws = draw(rng, given.reference.shape, self.settings, low=self.settings.dmd_low, high=self.settings.dmd_high)

        def gradient(student, fake, *, two_steps):
            def loss(student, probes, batch, given, draws):
                networks = (self._variables("student", student, frozen), self._variables("fake_score", fake, frozen))
                rest = (frozen, self.modules, batch, given, draws, state.step, self.settings)
                return student_loss(*networks, *rest, two_steps=two_steps, probes=probes)

            def one(*samples):
                probes = {name: jnp.zeros_like(samples[1].reference) for name in PROBES}
                of_loss = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
                (_, metrics), (gradients, probes) = of_loss(student, probes, *samples)
                return metrics, gradients, jax.tree.map(lambda x: jnp.sum(jnp.square(x)), probes)

            return self._mean(one, batch, given, draws)

        operands = (state.params["student"], state.params["fake_score"])
        metrics, gradients, squares = _by_length(two_steps, gradient, *operands)
        state, update = self._apply(state, "student", gradients)
        # Over the whole batch a sample counts one part of what it counts in its own.
        norms = {f"gradient_at_x0/{name}": jnp.sqrt(x / self.settings.accumulate) for name, x in squares.items()}
        metrics = finish_metrics(metrics) | update | norms
        return states.finish_step(state, self.settings.ema), metrics | {"unroll": 1 + jnp.asarray(two_steps, jnp.int32)}

    def _mean(self, function: Callable[..., Any], batch: Batch, given: Conditions, draws: Draws) -> Any:
        """`function(batch, given, draws)`, a mean over samples, taken over parts of the batch as the settings say."""
        student_draws, loss_draws = draws
        # What has no axis of samples stays out: the negative prompt, the same for all, and the key.
        own = {name: x for name, x in batch.items() if name not in parallel.SHARED}
        samples = (own, given._replace(negative=()), student_draws, loss_draws._replace(pixel_rng=()))

        def part(samples, rng):
            batch, conditions, student_draws, loss_draws = samples
            draws = (student_draws, loss_draws._replace(pixel_rng=rng))
            return function(batch, conditions._replace(negative=given.negative), draws)

        return accumulation.mean(part, samples, batch["weight"], loss_draws.pixel_rng, self.settings.accumulate)

    def _variables(self, name: str, params: Params, frozen: Mapping[str, Params]) -> lora.Variables:
        return self.adapted[name].variables(frozen, params) if name in self.adapted else {"params": params}

    def _apply(
        self, state: states.TrainState, name: str, gradients: Params
    ) -> tuple[states.TrainState, dict[str, jax.Array]]:
        settings = self.settings
        return states.apply_gradients(
            state, name, gradients, self.rules[name], skip_norm=settings.skip_norm, frozen=settings.frozen
        )


def outer_step(updates: Updates) -> Step:
    """T - 1 fake-score updates and one student update as one program.

    Batches carry a leading axis T; the last one is the student's. The unroll's length is one draw for all of them.
    `batch["negative_ids"]` and `["negative_mask"]` are [T, 1, L]: the same negative prompt everywhere.
    """

    def step(state, frozen, batches, rng):
        two_steps, rngs = _split(rng, batches, updates.settings)
        inner = jax.tree.map(lambda x: x[:-1], batches)
        last = jax.tree.map(lambda x: x[-1], batches)
        fake_metrics = {}
        if len(rngs) > 1:
            state, fake_metrics = jax.lax.scan(
                lambda carry, item: updates.fake_score(carry, frozen, *item, two_steps), state, (inner, rngs[:-1])
            )
        state, metrics = updates.student(state, frozen, last, rngs[-1], two_steps)
        return state, metrics | jax.tree.map(lambda x: x[-1], fake_metrics)

    return step


def parts(updates: Updates) -> dict[str, Step]:
    """Each update, for each length of the unroll, as a step of its own on one inner batch: "fake_score/2", ..."""
    both = {"fake_score": updates.fake_score, "student": updates.student}
    return {
        f"{name}/{length}": functools.partial(update, two_steps=length == 2)
        for name, update in both.items()
        for length in updates.settings.lengths
    }


def separate_steps(programs: Mapping[str, Step], settings: EditSettings) -> Step:
    """The same outer step as a program per update, for devices on which one program of all is too large.

    The result is not to be compiled as a whole. The same draws are made as in `outer_step`.

    Args:
      programs: `parts`, compiled.
    """
    take_apart = jax.jit(functools.partial(_take_apart, settings=settings))

    def step(state, frozen, batches, rng):
        two_steps, items = take_apart(rng, batches)
        length = 1 + int(jax.device_get(two_steps))
        metrics = {}
        for batch, key in items[:-1]:
            state, metrics = programs[f"fake_score/{length}"](state, frozen, batch, key)
        state, student_metrics = programs[f"student/{length}"](state, frozen, *items[-1])
        return state, student_metrics | metrics

    return step


def _take_apart(rng: jax.Array, batches: Batch, settings: EditSettings) -> tuple[jax.Array, list[tuple[Batch, Any]]]:
    """The length of the unroll, and each inner batch with its key."""
    two_steps, rngs = _split(rng, batches, settings)
    take = lambda number: jax.tree.map(lambda x: parallel.constrain_batch(x[number]), batches)  # noqa: E731
    return two_steps, [(take(number), rngs[number]) for number in range(len(rngs))]


def _split(rng: jax.Array, batches: Batch, settings: EditSettings) -> tuple[jax.Array, jax.Array]:
    """The length of the unroll, and a key for each inner batch [T]."""
    length_rng, rng = jax.random.split(rng)
    return draw_two_steps(length_rng, settings), jax.random.split(rng, batches["reference"].shape[0])


def _by_length(two_steps: Length, gradient: Callable[..., Any], *operands: Any) -> Any:
    """Runs the gradient of the drawn length; the condition stands outside, so that one length's residuals are kept."""
    if isinstance(two_steps, bool):
        return gradient(*operands, two_steps=two_steps)
    branches = (functools.partial(gradient, two_steps=length) for length in (True, False))
    return jax.lax.cond(two_steps, *branches, *operands)
