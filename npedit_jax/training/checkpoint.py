"""Checkpoints of a run: the train state and the place in the data, together, through Orbax."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

STATE, DATA = "state", "data"


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
        )
        self._manager = ocp.CheckpointManager(epath.Path(workdir).resolve() / "checkpoints", options=options)

    def latest(self) -> int | None:
        """The newest finished step, None when there is none."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether `save` would write at this step."""
        return self._manager.should_save(step)

    def save(self, step: int, state: Any, data: dict[str, Any], *, force: bool = False) -> None:
        """Writes state and data position; `force` also between the regular steps."""
        if step == self.latest():
            return
        arguments = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), DATA: ocp.args.JsonSave(data)})
        self._manager.save(step, args=arguments, force=force)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a step into the shapes, types and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract), DATA: ocp.args.JsonRestore()})
        restored = self._manager.restore(step, args=arguments)
        return restored[STATE], restored[DATA]

    def restore_part(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Reads only the parts of the state that `like` names (the averages, say)."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.PyTreeRestore(
            item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        return self._manager.restore(step, args=ocp.args.Composite(**{STATE: arguments}))[STATE]

    def close(self) -> None:
        """Waits for what is being written and lets go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()
