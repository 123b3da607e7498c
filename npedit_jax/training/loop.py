"""The loop that every stage runs in: feed, step, log, save."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from npedit_jax import parallel
from npedit_jax.data.batches import iterate
from npedit_jax.training import hosts, stages, state, telemetry
from npedit_jax.training.checkpoint import Checkpoints

Preview = Callable[[stages.Stage, state.TrainState, dict[str, Any], int], None]


def run(
    config: ml_collections.ConfigDict,
    stage: stages.Stage,
    workdir: epath.PathLike,
    *,
    preview: Preview | None = None,
) -> state.TrainState:
    """Trains the stage built from `config` up to `config.steps`, from the newest checkpoint where there is one.

    Args:
      preview: called with (stage, state, frozen parameters, step) every `config.log.preview_every` steps, and last.

    Returns:
      The final state.

    Raises:
      Preempted: one of several hosts got SIGTERM; all have saved.
    """
    with jax.set_mesh(stage.mesh):
        return _run(config, stage, workdir, preview)


def _run(
    config: ml_collections.ConfigDict, stage: stages.Stage, workdir: epath.PathLike, preview: Preview | None
) -> state.TrainState:
    train_state, frozen = stage.start(), stage.frozen()
    batches = iterate(stage.dataset)
    checkpoints = Checkpoints(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
    start = checkpoints.latest() or 0
    if start:
        train_state, position = checkpoints.restore(start, train_state)
        batches.set_state(position)
        logging.info("resumed from step %d", start)
    meter = telemetry.Meter(workdir, start, stages.work(config, stage))
    wandb_project = config.log.wandb_project if "wandb_project" in config.log else ""
    log = telemetry.MetricsLog(workdir, restored_step=start, wandb_project=wandb_project)
    profiler = telemetry.Profiler(workdir, config.log.profile_steps if "profile_steps" in config.log else ())

    keys = _StepKeys(config.seed, stage.mesh)
    pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
    stopped = None
    with telemetry.progress(config.steps, start, config.stage) as bar:
        for step in range(start + 1, config.steps + 1):
            profiler.before(step)
            with meter.data():
                host_batch = next(batches)
            # What is moved to a device is moved by name: a hidden transfer every step would go unnoticed.
            with jax.transfer_guard("disallow"):
                batch = parallel.put_batch(host_batch, stage.mesh, leading_axes=1 if stage.inner_batches else 0)
                train_state, metrics = stage.step(train_state, frozen, batch, keys(step))
            meter.count()
            # One step late: reading this step's metrics would wait for it.
            pending = _log(log, bar, pending)
            if step % config.log.every == 0 or step == config.steps:
                pending = (step, metrics, meter.read())
            profiler.after(step, metrics)
            bar.update()
            stopped = step if hosts.stop_at(step) else None
            last = step == config.steps or stopped is not None
            with meter.apart():
                if checkpoints.due(step) or last:
                    pending = _log(log, bar, pending)
                    log.flush()
                    checkpoints.save(step, train_state, batches.get_state(), force=last)
                if preview and (step % config.log.preview_every == 0 or step == config.steps):
                    preview(stage, train_state, frozen, step)
            if last:
                break
        _log(log, bar, pending)
    profiler.close()
    log.close()
    checkpoints.close()
    if stopped is not None and stopped < config.steps:
        raise hosts.Preempted(stopped)
    return train_state


class _StepKeys:
    """The random key of each step, on every device."""

    def __init__(self, seed: int, mesh: jax.sharding.Mesh):
        # Half of the seed's key made the initial weights.
        make = lambda number: jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], number)  # noqa: E731
        self._place = parallel.replicated(mesh)
        self._make = jax.jit(make, out_shardings=self._place)

    def __call__(self, step: int) -> jax.Array:
        return self._make(parallel.put(np.uint32(step), self._place))


def _log(log: telemetry.MetricsLog, bar: Any, pending: Any) -> None:
    """Writes the metrics that an earlier step left behind."""
    if pending is None:
        return
    step, metrics, times = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.write(step, values | times)
    bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
