"""The loop that every stage runs in: feed, step, log, save."""

import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath

from npedit_jax import parallel
from npedit_jax.data.batches import iterate
from npedit_jax.training import stages, state, telemetry
from npedit_jax.training.checkpoint import Checkpoints


def run(
    config: ml_collections.ConfigDict,
    stage: stages.Stage,
    workdir: epath.PathLike,
    *,
    preview: Callable[[stages.Stage, state.TrainState, dict[str, Any], int], None] | None = None,
) -> state.TrainState:
    """Trains the stage built from `config` up to `config.steps`, from the newest checkpoint where there is one.

    Args:
      preview: called with (stage, state, frozen parameters, step) every `config.log.preview_every` steps, and last.

    Returns:
      The final state.
    """
    mesh = parallel.make_mesh(**config.mesh.to_dict())
    train_state = parallel.put_replicated(state.create(stage.trained(), stage.rules, stage.averaged), mesh)
    frozen = parallel.put_replicated(stage.frozen(), mesh)
    batches = iterate(stage.dataset, stage.reading)

    checkpoints = Checkpoints(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
    start = checkpoints.latest() or 0
    if start:
        train_state, position = checkpoints.restore(start, train_state)
        batches.set_state(position)
        logging.info("resumed from step %d", start)
    log = telemetry.MetricsLog(workdir, restored_step=start)

    step_function = stage.program()
    _, base_rng = jax.random.split(jax.random.key(config.seed))  # the other half made the initial weights
    pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
    with telemetry.progress(config.steps, start, config.stage) as bar:
        for step in range(start + 1, config.steps + 1):
            started = time.monotonic()
            batch = parallel.put_batch(next(batches), mesh, leading_axes=1 if stage.inner_batches else 0)
            fed = time.monotonic()
            train_state, metrics = step_function(train_state, frozen, batch, jax.random.fold_in(base_rng, step))
            # One step late: reading this step's metrics would wait for it.
            pending = _log(log, bar, pending)
            if step % config.log.every == 0 or step == config.steps:
                counts = {f"data/{name}": batches.counts[name] for name in ("bad", "cut")}
                pending = (step, metrics, {"time/data": fed - started, "time/clock": time.time(), **counts})
            bar.update()
            if checkpoints.due(step) or step == config.steps:
                pending = _log(log, bar, pending)
                log.flush()
                checkpoints.save(step, train_state, batches.get_state(), force=step == config.steps)
            if preview and (step % config.log.preview_every == 0 or step == config.steps):
                preview(stage, train_state, frozen, step)
        _log(log, bar, pending)
    log.close()
    checkpoints.close()
    return train_state


def _log(log: telemetry.MetricsLog, bar: Any, pending: Any) -> None:
    """Writes the metrics that an earlier step left behind."""
    if pending is None:
        return
    step, metrics, times = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.write(step, values | times)
    bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
