"""Runs through the loop: started, broken off, and what they wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from ml_collections import ConfigDict

from npedit_jax.data.batches import Reading
from npedit_jax.training import loop, stages, state, telemetry, workdirs


class Interrupted(Exception):
    """Stands for whatever ends a run between two steps."""


def start(
    config: ConfigDict, stage: stages.Stage, workdir: epath.PathLike, preview: loop.Preview | None = None
) -> state.TrainState:
    """The final state of a run of a stage that may run again: a run takes the arrays of its networks over."""
    workdirs.open_run(workdir, config)
    networks = {
        name: network._replace(params=jax.tree.map(jnp.copy, network.params) if name in stage.rules else network.params)
        for name, network in stage.networks.items()
    }
    reading = Reading(**config.data.reading)
    return loop.run(config, dataclasses.replace(stage, networks=networks, reading=reading), workdir, preview=preview)


def break_off(config: ConfigDict, stage: stages.Stage, workdir: epath.PathLike, after: int) -> None:
    """Ends a run after a step, with a checkpoint where one was due."""

    def stop(stage, state, frozen, step):
        if step == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        start(config, stage, workdir, preview=stop)


def untimed(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The metrics of a run without its wall-clock figures."""
    rows = telemetry.read_metrics(workdir)
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
