"""The loop that every stage runs in: feed, step, log, save."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from npedit_jax import parallel
from npedit_jax.data.batches import iterate
from npedit_jax.training import stages, state, stopping, telemetry, work
from npedit_jax.training.checkpoint import Checkpoints
from npedit_jax.training.faults import DataStall, RunFault, TooManySkipped
from npedit_jax.training.skip_limit import SkipLimit
from npedit_jax.training.watched import Watched

Pending = tuple[int, dict[str, jax.Array], dict[str, float]] | None
CLOSING_SECONDS = 60.0  # for a checkpoint under way, where no batch came either
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
      Stopped: a signal asked for it, on any host; the run has saved.
      RunFault, TooManyBadRecords: it cannot go on; the checkpoints are whole.
    """
    with jax.set_mesh(stage.mesh):
        return _run(config, stage, workdir, preview)


def _run(
    config: ml_collections.ConfigDict, stage: stages.Stage, workdir: epath.PathLike, preview: Preview | None
) -> state.TrainState:
    guard, frozen = config.guard, stage.frozen()
    batches = Watched(iterate(stage.dataset, stage.reading), guard.data_seconds)
    checkpoints = Checkpoints(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
    train_state, start = _begin(stage, checkpoints, batches)
    skipped = jax.device_get(train_state.skipped)
    limit = SkipLimit(guard.skipped_share, guard.window, stages.updates(config), start, skipped)
    meter = telemetry.Meter(workdir, start, work.of_step(config, stage))
    log = telemetry.MetricsLog(workdir, restored_step=start, wandb_project=config.log.wandb_project)
    profiler = telemetry.Profiler(workdir, config.log.profile_steps)

    keys = _StepKeys(config.seed, stage.mesh)
    pending: Pending = None
    stopped = False
    with (
        telemetry.progress(config.steps, start, config.stage) as bar,
        stopping.StopRequest() as stop,
        _closing(log, checkpoints, batches, profiler),
    ):
        for step in range(start + 1, config.steps + 1):
            profiler.before(step)
            with meter.data():
                host_batch = next(batches)
            # What is moved to a device is moved by name: a hidden transfer every step would go unnoticed.
            with jax.transfer_guard("disallow"):
                batch = parallel.put_batch(host_batch, stage.mesh, leading_axes=1 if stage.inner_batches else 0)
                train_state, metrics = stage.step(train_state, frozen, batch, keys(step))
            meter.count()
            if step == start + 1:
                bar.set_postfix_str("", refresh=False)  # compiled
            # One step late: reading this step's metrics would wait for it.
            pending = _log(log, bar, limit, pending)
            if step % config.log.every == 0 or step == config.steps:
                counts = {f"data/{name}": count for name, count in batches.counts.items() if name != "samples"}
                pending = (step, metrics, meter.read() | counts)
            profiler.after(step, metrics)
            bar.update()
            stopped = stop.asked_for(step)
            last = step == config.steps or stopped
            saves = checkpoints.due(step) or last
            shows = preview is not None and (step % config.log.preview_every == 0 or step == config.steps)
            if saves or shows:
                jax.block_until_ready(metrics)  # steps under way are waited for here, where their time is counted
            with meter.apart():
                if saves:
                    pending = _log(log, bar, limit, pending)
                    log.flush()
                    limit.check(step, _values(metrics))  # a checkpoint is from before the limit, between logs as well
                    checkpoints.save(step, train_state, batches.get_state(), force=last)
                if shows:
                    preview(stage, train_state, frozen, step)
            if last:
                break
        # Within: a signal that comes while the last checkpoint is being written changes nothing.
        checkpoints.close()
    if stopped and step < config.steps:
        raise stopping.Stopped(step, stop.signal)
    return train_state


def _begin(stage: stages.Stage, checkpoints: Checkpoints, batches: Watched) -> tuple[state.TrainState, int]:
    """The state to go on from, and its step: of the newest checkpoint, whose batches come next, or the initial one."""
    like = stage.shapes()

    def restore(step: int) -> tuple[state.TrainState, dict[str, Any]]:
        stage.drop_initial()
        return checkpoints.restore(step, like)

    found = checkpoints.newest(restore)
    if found is None:
        return stage.start(), 0
    step, (train_state, position) = found
    batches.set_state(position)
    logging.info("resumed from step %d", step)
    return train_state, step


class _StepKeys:
    """The random key of each step, on every device."""

    def __init__(self, seed: int, mesh: jax.sharding.Mesh):
        # Half of the seed's key made the initial weights.
        make = lambda number: jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], number)  # noqa: E731
        self._place = parallel.replicated(mesh)
        self._make = jax.jit(make, out_shardings=self._place)

    def __call__(self, step: int) -> jax.Array:
        return self._make(parallel.put(np.uint32(step), self._place))


@contextlib.contextmanager
def _closing(
    log: telemetry.MetricsLog, checkpoints: Checkpoints, batches: Watched, profiler: telemetry.Profiler
) -> Iterator[None]:
    """Lets what is under way come to its end, also where the run ends with a fault."""
    try:
        yield
    except Exception as error:
        # A checkpoint is finished by all hosts together: one that ends alone would wait for the others without an end.
        together = jax.process_count() == 1 or isinstance(error, TooManySkipped)
        for each in (log, checkpoints) if together else (log,):
            # Where batches hang, so may what is being written: the storage is the same.
            _try(each.close, seconds=CLOSING_SECONDS if isinstance(error, DataStall) else None)
        raise
    finally:
        batches.close()
        profiler.close()
    log.close()


def _try(close: Callable[[], None], seconds: float | None) -> None:
    """Closes what can be closed in that time, after another fault, which is the one to tell."""

    def attempt() -> None:
        with contextlib.suppress(RunFault, OSError):
            close()

    if seconds is None:
        attempt()
        return
    thread = threading.Thread(target=attempt, name="closing", daemon=True)
    thread.start()
    thread.join(seconds)


def _log(log: telemetry.MetricsLog, bar: Any, limit: SkipLimit, pending: Pending) -> None:
    """Writes the metrics that an earlier step left behind, and looks for too many skipped updates."""
    if pending is None:
        return
    step, metrics, times = pending
    values = _values(metrics)
    log.write(step, values | times)
    bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
    limit.check(step, values)


def _values(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
