"""The device mesh, and how every array of a run lies on it.

Mesh axes: "data" (copies of the parameters; slices of a multi-slice job lie along it), "fsdp" (parameters, optimizer
state and frozen networks are split over it, and the batch as well) and "tensor" (heads and hidden widths of a layer).
Collectives are XLA's: this module only says where arrays lie.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what the batch axis of activations is split over
SPLIT = ("fsdp", "tensor")  # what one dimension is split over where only one can be
SHARED = ("negative_ids", "negative_mask")  # fields of a batch that hold one row for all of its samples
WHOLE = PartitionSpec()

# Every parameter of every network by its "/"-joined path -> the last axes of its array. Axes before them (the stacked
# layers) stay whole, since a scan reads one layer at a time. A path matches exactly one row; a mesh axis that does not
# divide its dimension is left out. Kernels are [in, out], or [height, width, in, out].
TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    # Into heads and hidden units, which "tensor" splits, and back out of them.
    (r"(.*/)?attention/(query|key|value)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(.*/)?attention/(out|output)/kernel", PartitionSpec("tensor", "fsdp")),
    (r"(.*/)?(mlp/gate|mlp/up|mlp_up|projector/up)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(.*/)?(mlp/down|mlp_down|projector/down)/kernel", PartitionSpec("tensor", "fsdp")),
    # Adapters: the rank is too small to be split.
    (r".+/a", PartitionSpec(SPLIT, None)),
    (r".+/b", PartitionSpec(None, SPLIT)),
    # Scales and gates of a layer act on its whole width: an output over "tensor" would only be gathered again.
    (r"(.*/)?modulation/kernel", PartitionSpec(None, "fsdp")),
    (r"caption_projection/kernel", PartitionSpec("fsdp", None)),
    # By width: vocabularies have sizes that nothing divides, and a lookup then moves its few rows, not the table.
    (r"(.*/)?embedding/embedding", PartitionSpec(None, SPLIT)),
    (r"(.*/)?unembedding/kernel", PartitionSpec(SPLIT, None)),
    (r"(encoder|decoder)/.*(conv_\w+|shortcut|upsample|downsample)/kernel|(post_)?quant/kernel",
     PartitionSpec(None, None, None, "fsdp")),
    # Less than a million parameters each.
    (r"(vision/)?(patch_embedding|stem_\d)/kernel|time_embedding/(hidden|out)/kernel|final/projection/kernel", WHOLE),
    # Vectors.
    (r"(.*/)?(bias|scale|attention_scale|mlp_scale|newline|class_token|positions|x_pad_token|cap_pad_token)", WHOLE),
)  # fmt: skip
_PATTERNS = [(re.compile(pattern), spec) for pattern, spec in TABLE]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out over the axes; -1 takes what the other axes leave.

    Devices of several TPU slices are laid so that "data" alone runs from slice to slice, over the slower network.

    Args:
      devices: all of the job by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the slices do not divide "data".
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(len(devices) // -int(np.prod(sizes)), 1)
    shape = dict(zip(AXES, sizes, strict=True))
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise ValueError(f"the mesh {shape} does not use the {len(devices)} devices there are; change config.mesh")
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if sizes[0] % slices:
        raise ValueError(f"{slices} slices lie along the mesh axis data, found {shape}; make mesh.data a multiple")
    per_slice = (sizes[0] // slices, *sizes[1:])
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(per_slice, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(per_slice, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(path: str) -> PartitionSpec:
    """The table's entry for a parameter's "/"-joined path: of the last axes of its array.

    Raises:
      ValueError: no row matches, or more than one.
    """
    found = [(pattern.pattern, spec) for pattern, spec in _PATTERNS if pattern.fullmatch(path)]
    if len(found) != 1:
        rows = [pattern for pattern, _ in found] or "none"
        raise ValueError(
            f"parameter {path!r} must match exactly one row of npedit_jax.parallel.TABLE, found {rows}; mend the table"
        )
    return found[0][1]


def parameter_sharding(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    """Where a parameter of that path and shape lies; raises as `spec_of`, or where the array has too few axes."""
    spec = spec_of(path)
    if len(spec) > len(shape):
        raise ValueError(f"parameter {path!r} has shape {tuple(shape)}, too few axes for its row's {spec}")
    return NamedSharding(mesh, _fit(mesh, PartitionSpec(*(None,) * (len(shape) - len(spec)), *spec), shape))


def parameter_shardings(mesh: Mesh, params: Any) -> Any:
    """The tree of shardings of one network's parameters or adapters, arrays or their shapes."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    found = {path: parameter_sharding(mesh, path, leaf.shape) for path, leaf in flat.items()}
    return flax.traverse_util.unflatten_dict(found, sep="/")


def optimizer_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings of one network's optimizer state: an array that belongs to a parameter lies as the parameter does.

    It is known by its place: optimizers keep their moments in trees like the parameters', of nested dictionaries.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names: list[str] = []
        for key in path:
            names = [*names, key.key] if isinstance(key, jax.tree_util.DictKey) else []
        if not leaf.ndim or not names:
            return replicated(mesh)
        return parameter_sharding(mesh, "/".join(names), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, state)


def _fit(mesh: Mesh, spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """Leaves out mesh axes that do not divide their dimension."""

    def axes_of(entry: Any, size: int) -> Any:
        kept: tuple[str, ...] = ()
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            parts = mesh.shape[axis]
            if size % parts == 0:
                kept, size = (*kept, axis), size // parts
        return kept if len(kept) > 1 else kept[0] if kept else None

    return PartitionSpec(*(axes_of(entry, size) for entry, size in zip(spec, shape, strict=True)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, WHOLE)


def batch_sharding(mesh: Mesh, leading_axes: int = 0) -> NamedSharding:
    """Samples spread over "data" and "fsdp"; `leading_axes` axes before the batch axis stay whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_axes, BATCH))


def field_sharding(mesh: Mesh, name: str, leading_axes: int = 0) -> NamedSharding:
    """Where a field of a batch lies."""
    return replicated(mesh) if name in SHARED else batch_sharding(mesh, leading_axes)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, leading_axes: int = 0) -> dict[str, jax.Array]:
    """Places a host's samples of a batch, in the order of its places (see `host_places`), on its devices."""
    places, of = host_places(mesh)

    def put(name: str, value: np.ndarray) -> jax.Array:
        sharding = field_sharding(mesh, name, leading_axes)
        if name in SHARED:
            return _from_parts(value.shape, sharding, lambda index: value[index])
        width = value.shape[leading_axes] // len(places)
        shape = (*value.shape[:leading_axes], width * of, *value.shape[leading_axes + 1 :])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, _, _ = index[leading_axes].indices(width * of)
            here = places.index(start // width) * width
            return value[(*index[:leading_axes], slice(here, here + width), *index[leading_axes + 1 :])]

        return _from_parts(shape, sharding, part)

    return {name: put(name, value) for name, value in batch.items()}


def _from_parts(
    shape: Sequence[int], sharding: NamedSharding, part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array whose parts this process puts on its devices, each by name: no transfer that a guard would forbid."""
    places = sharding.addressable_devices_indices_map(tuple(shape))
    shards = [jax.device_put(part(index), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards)


def host_places(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Which places of every batch this process feeds, in rising order, and how many places there are.

    A place is a position along "data" and "fsdp". Those of a process need not lie side by side: a mesh follows the
    links between the chips. Processes whose devices differ along "tensor" only feed the same places.

    Raises:
      ValueError: the mesh gives processes parts of different sizes, or parts that overlap.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(-1, mesh.shape["tensor"])
    places = {
        process: tuple(np.flatnonzero((owners == process).any(axis=1)).tolist())
        for process in np.unique(owners).tolist()
    }
    distinct = set(places.values())
    if len({len(part) for part in distinct}) > 1 or sum(len(part) for part in distinct) != len(owners):
        raise ValueError(f"mesh {dict(mesh.shape)} cuts the batch across hosts unevenly: {places}; change config.mesh")
    return places[jax.process_index()], len(owners)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Tells XLA how an activation lies on the mesh in use (`jax.set_mesh`): mesh axes of each of its dimensions.

    Axes that do not divide their dimension are left out. Without a mesh, `x` as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _fit(mesh, PartitionSpec(*axes), x.shape))


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps an activation [B, ...] split by samples: each device computes its own samples with whole layers."""
    return constrain(x, BATCH, *(None,) * (x.ndim - 1))


def place(make: Callable[..., Any], shardings: Any, *arguments: Any, donate: Sequence[int] = ()) -> Any:
    """Runs `make(*arguments)` so that each of its results is computed where it is to lie, never whole on one device."""
    return jax.jit(make, out_shardings=shardings, donate_argnums=tuple(donate))(*arguments)


def on_host(shardings: Any) -> Any:
    """The same places in the memory of the devices' host."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), shardings)


def on_devices(tree: Any) -> Any:
    """Inside a program: arrays that lie in the host's memory are brought to the devices; others stay as they are."""

    def one(x: jax.Array) -> jax.Array:
        held = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if held else x

    return jax.tree.map(one, tree)


def put(tree: Any, shardings: Any) -> Any:
    """Places arrays that every process holds whole; each device receives its part."""

    def one(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        value = np.asarray(value)
        return _from_parts(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(one, tree, shardings)
