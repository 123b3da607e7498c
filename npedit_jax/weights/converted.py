"""A network's parameters as an Orbax checkpoint: hosts of a pod read their own shards of it, all at the same time.

A converted directory holds the Hugging Face config.json, tokenizer files where there were any, and the Orbax checkpoint
`params`. It is written by `python -m npedit_jax.convert` and read by `npedit_jax.weights.load`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import orbax.checkpoint as ocp
from etils import epath

PARAMS = "params"
# A host reads whole chunks: small enough that a shard of a kernel is not much less than what is read for it, large
# enough that a network is some thousands of reads.
CHUNK_BYTES = 4 * 1024 * 1024


def is_converted(directory: epath.Path) -> bool:
    """Whether the directory holds an Orbax checkpoint of parameters; an unfinished one does not count."""
    return (directory / PARAMS / "_METADATA").exists()


def write(directory: epath.Path, params: Mapping[str, Any]) -> None:
    """Writes `params` below the directory, whole or not at all; every process of a run calls this."""
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with _checkpointer() as checkpointer:
        checkpointer.save(directory.resolve() / PARAMS, args=ocp.args.PyTreeSave(params, save_args=save_args))


def read(
    directory: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str | None,
    place: Callable[[str], jax.sharding.Sharding | None],
) -> dict[str, Any]:
    """Reads the parameters, of each only what the devices of this process hold.

    Args:
      shapes: of the module's parameters, by path.
      dtype: of the parameters; None keeps each as it is stored.
      place: the sharding of each path; None is the default device.

    Raises:
      ValueError: parameters and module do not match one to one; the message lists all that do not.
    """
    path, here = directory.resolve() / PARAMS, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _checkpointer() as checkpointer:
        stored = flax.traverse_util.flatten_dict(checkpointer.metadata(path).item_metadata.tree, sep="/")
        problems = [f"missing: target {name} {list(shapes[name])}" for name in sorted(shapes.keys() - stored.keys())]
        problems += [f"unexpected: {name} {list(stored[name].shape)}" for name in sorted(stored.keys() - shapes.keys())]
        problems += [
            f"shape: target {name} {list(shapes[name])}, stored {list(stored[name].shape)}"
            for name in sorted(shapes.keys() & stored.keys())
            if tuple(stored[name].shape) != shapes[name]
        ]
        if problems:
            lines = "\n  ".join(problems)
            raise ValueError(f"{path} does not fit the network of the config.json beside it; convert again:\n  {lines}")
        like = {
            name: jax.ShapeDtypeStruct(
                shape, jax.numpy.dtype(dtype or stored[name].dtype), sharding=place(name) or here
            )
            for name, shape in shapes.items()
        }
        like = flax.traverse_util.unflatten_dict(like, sep="/")
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=like, restore_args=restore_args))


def _checkpointer() -> ocp.Checkpointer:
    # Zarr 3 keeps the chunks of a parameter in few files.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True))
