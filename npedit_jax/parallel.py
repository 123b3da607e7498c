"""The device mesh and how arrays lie on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Lays all devices out over the axes; -1 takes what the other axes leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.devices()
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(len(devices) // -int(np.prod(sizes)), 1)
    if int(np.prod(sizes)) != len(devices):
        shape = dict(zip(AXES, sizes, strict=True))
        raise ValueError(f"the mesh {shape} does not use the {len(devices)} devices there are; change config.mesh")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading_axes: int = 0) -> NamedSharding:
    """Samples spread over "data" and "fsdp"; `leading_axes` axes before the batch axis stay whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_axes, ("data", "fsdp")))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, leading_axes: int = 0) -> dict[str, jax.Array]:
    """Places a host's batch on its devices; what has a batch axis of 1 is the same for all samples, and replicated."""

    def put(value: np.ndarray) -> jax.Array:
        shared = value.shape[leading_axes] == 1
        sharding = replicated(mesh) if shared else batch_sharding(mesh, leading_axes)
        return jax.make_array_from_process_local_data(sharding, value)

    return {name: put(value) for name, value in batch.items()}


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Places a tree of host arrays, whole, on every device."""
    return jax.device_put(tree, replicated(mesh))
