"""Checkpoints of a run: the train state and the place in the data, together, through Orbax.

A checkpoint that cannot be read, or that reads as something else than was saved, is passed over for the one before it.
"""

import json
import re
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from npedit_jax.training.faults import RunFault

STATE, DATA, SUMS = "state", "data", "sums"
DAMAGED = "damaged"  # where damaged checkpoints are put, beside the directory of the good ones
Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints of one working directory, newest last; saving goes on in the background."""

    def __init__(self, workdir: epath.PathLike, *, every: int, keep: int, read_only: bool = False):
        """Opens `workdir/checkpoints`.

        Args:
          every: steps between two checkpoints.
          keep: how many of the newest stay.
          read_only: never writes; the directory must exist.
        """
        options = ocp.CheckpointManagerOptions(
            # Without a policy Orbax also saves the first step it is asked about.
            save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(every),
            max_to_keep=keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # what a kill left half written
        )
        self._read_only = read_only
        self._directory = epath.Path(workdir).resolve() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest(self) -> int | None:
        """The newest finished step, None when there is none."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether `save` would write at this step."""
        return self._manager.should_save(step)

    def save(self, step: int, state: Any, data: dict[str, Any], *, force: bool = False) -> None:
        """Writes state and data position; `force` also between the regular steps.

        Raises:
          RunFault: this checkpoint, or the one before it, which was written in the background, failed.
        """
        if step == self.latest():
            return
        # The place in the data is as easily damaged as the parameters.
        values = {DATA: data, SUMS: sums(state) | {DATA: _sum_json(data)}}
        items = {STATE: ocp.args.StandardSave(state)} | {name: ocp.args.JsonSave(x) for name, x in values.items()}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=force)
        except Exception as error:  # of Orbax, TensorStore or the file system
            raise self._failed(step, error) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a step into the shapes, types and shardings of `like`; raises whatever a damaged one leads to."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract), DATA: ocp.args.JsonRestore()})
        restored = self._manager.restore(step, args=arguments)
        self._compare(step, sums(restored[STATE]) | {DATA: _sum_json(restored[DATA])})
        return restored[STATE], restored[DATA]

    def restore_part(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Reads only the parts of the state that `like` names (the averages, say)."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.PyTreeRestore(
            item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(**{STATE: arguments}))[STATE]
        self._compare(step, sums(restored))
        return restored

    def newest(self, read: Callable[[int], Result]) -> tuple[int, Result] | None:
        """The newest step that `read` can read, and what it reads; None where there is no checkpoint.

        Damaged newer ones are named in the log and, unless read-only, moved out of the way.

        Raises:
          RunFault: none of the checkpoints can be read, or one does not fit into memory; all are left where they are.
        """
        faults = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            result, fault = None, ""
            try:
                result = read(step)
            except Exception as error:  # TensorStore, Orbax and JSON each have their own
                fault = _reason(error)
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise RunFault(f"the checkpoint of step {step} does not fit into memory: {fault}") from error
            if not _on_all_hosts(not fault):
                faults[step] = fault or "another host could not read it"
                logging.warning("checkpoint of step %d is damaged and passed over: %s", step, faults[step])
                continue
            if faults and not self._read_only:
                self._set_aside(list(faults))
            return step, result
        if faults:
            found = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
            raise RunFault(f"none of the checkpoints in {self._directory} can be read: {found}")
        return None

    def close(self) -> None:
        """Waits for what is being written and lets go of the directory; raises RunFault as `save` does."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(None, error) from error
        self._manager.close()

    def _compare(self, step: int, found: dict[str, int]) -> None:
        """Raises ValueError where something is not what was saved: a flipped bit reads without an error."""
        if not (self._directory / str(step) / SUMS).exists():
            return
        saved = self._manager.restore(step, args=ocp.args.Composite(**{SUMS: ocp.args.JsonRestore()}))[SUMS]
        if changed := [name for name, value in found.items() if saved.get(name) != value]:
            raise ValueError(f"{len(changed)} values are not what was saved: {', '.join(changed[:3])}")

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            place = self._directory.parent / DAMAGED
            place.mkdir(exist_ok=True)
            for step in steps:
                # The same step may have been damaged before.
                before = sum(path.name.partition(".")[0] == str(step) for path in place.iterdir())
                (self._directory / str(step)).rename(place / (f"{step}.{before}" if before else str(step)))
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def _failed(self, step: int | None, error: Exception) -> RunFault:
        finished = [int(path.name) for path in self._directory.glob("*") if path.name.isdigit()]
        which = "the last checkpoint" if step is None else f"the checkpoint of step {step}, or the one before it,"
        kept = f"step {max(finished)} is whole" if finished else "there is none before it"
        return RunFault(
            f"{which} could not be written: {_reason(error)}; {kept}. Mend the storage and start the same command again"
        )


def sums(tree: Any) -> dict[str, int]:
    """The bits of each array summed up as whole numbers modulo 2^32: the same on whichever devices the array lies."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    resident = [number for number, x in enumerate(leaves) if not _in_host_memory(x)]
    found = dict(zip(resident, _sum_bits([leaves[number] for number in resident]), strict=True))
    for number, x in enumerate(leaves):
        if _in_host_memory(x):  # one at a time: it is there because the device has no room for all
            (found[number],) = _sum_bits([jax.device_put(x, x.sharding.with_memory_kind("device"))])
    found = jax.device_get([found[number] for number in range(len(leaves))])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(x) for path, x in zip(paths, found, strict=True)
    }


def _sum_json(data: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def _in_host_memory(x: jax.Array) -> bool:
    return isinstance(x, jax.Array) and x.sharding.memory_kind == "pinned_host"


@jax.jit
def _sum_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = x.astype(width) if x.dtype == bool else jax.lax.bitcast_convert_type(x, width)
        return jnp.sum(bits, dtype=jnp.uint32)

    return [one(x) for x in leaves]


def _on_all_hosts(good: bool) -> bool:
    """Whether it is so on every host: all take the same checkpoint."""
    if jax.process_count() == 1:
        return good
    return bool(multihost_utils.process_allgather(jnp.asarray(good)).all())


def _reason(error: Exception) -> str:
    """What an error says, without TensorStore's specifications; the end of it, where the cause stands."""
    text = " ".join(re.split(r" \[| See full TensorStore", str(error))[0].split()) or type(error).__name__
    return text if len(text) <= 200 else "... " + text[-200:]
