"""The loop that every stage runs in: feed, step, log, save."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath

from npedit_jax import parallel
from npedit_jax.data.batches import iterate
from npedit_jax.training import stages, state, stopping, telemetry
from npedit_jax.training.checkpoint import Checkpoints
from npedit_jax.training.faults import RunFault
from npedit_jax.training.skip_limit import SkipLimit
from npedit_jax.training.watched import Watched

GUARD = ml_collections.FrozenConfigDict(dict(skipped_share=0.2, window=100, data_seconds=600.0))  # where there is none
Pending = tuple[int, dict[str, jax.Array], dict[str, float]] | None


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

    Raises:
      Stopped: a signal asked for it; the run has saved.
      RunFault: it cannot go on; the checkpoints are whole.
    """
    mesh = parallel.make_mesh(**config.mesh.to_dict())
    train_state = parallel.put_replicated(state.create(stage.trained(), stage.rules, stage.averaged), mesh)
    frozen = parallel.put_replicated(stage.frozen(), mesh)
    guard = config.guard if "guard" in config else GUARD
    batches = Watched(iterate(stage.dataset), guard.data_seconds)

    checkpoints = Checkpoints(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
    start, found = 0, checkpoints.newest(lambda step: checkpoints.restore(step, train_state))
    if found:
        start, (train_state, position) = found
        batches.set_state(position)
        logging.info("resumed from step %d", start)
    limit = SkipLimit(guard.skipped_share, guard.window, stage.updates(), start, jax.device_get(train_state.skipped))
    log = telemetry.MetricsLog(workdir, restored_step=start)

    step_function = stage.program()
    _, base_rng = jax.random.split(jax.random.key(config.seed))  # the other half made the initial weights
    pending: Pending = None
    with (
        telemetry.progress(config.steps, start, config.stage) as bar,
        stopping.StopRequest() as stop,
        _closing(log, checkpoints, batches),
    ):
        for step in range(start + 1, config.steps + 1):
            started = time.monotonic()
            batch = parallel.put_batch(next(batches), mesh, leading_axes=1 if stage.inner_batches else 0)
            fed = time.monotonic()
            train_state, metrics = step_function(train_state, frozen, batch, jax.random.fold_in(base_rng, step))
            # One step late: reading this step's metrics would wait for it.
            pending = _log(log, bar, limit, pending)
            if step % config.log.every == 0 or step == config.steps:
                pending = (step, metrics, {"time/data": fed - started, "time/clock": time.time()})
            bar.update()
            if jax.process_count() == 1:  # several have JAX's own notice
                stop.listen()
            last = step == config.steps or stop.signal is not None
            if checkpoints.due(step) or last:
                pending = _log(log, bar, limit, pending)
                log.flush()
                checkpoints.save(step, train_state, batches.get_state(), force=last)
            if preview and (step % config.log.preview_every == 0 or step == config.steps):
                preview(stage, train_state, frozen, step)
            if last:
                break
        # Within: a signal that comes while the last checkpoint is being written changes nothing.
        checkpoints.close()
    if stop.signal is not None and step < config.steps:
        raise stopping.Stopped(step, stop.signal)
    return train_state


@contextlib.contextmanager
def _closing(log: telemetry.MetricsLog, checkpoints: Checkpoints, batches: Watched) -> Iterator[None]:
    """Lets what is under way come to its end, also where the run ends with a fault."""
    try:
        yield
    except RunFault:
        with contextlib.suppress(RunFault, OSError):
            log.close()
            checkpoints.close()
        raise
    finally:
        batches.close()
    log.close()


def _log(log: telemetry.MetricsLog, bar: Any, limit: SkipLimit, pending: Pending) -> None:
    """Writes the metrics that an earlier step left behind, and looks for too many skipped updates."""
    if pending is None:
        return
    step, metrics, times = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.write(step, values | times)
    bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
    limit.check(step, values)
