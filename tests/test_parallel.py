"""The mesh and the table of shardings: each parameter of each network in one row, moments and averages with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, PartitionSpec

from configs.easyvqa import base, scorer
from configs.zimage import npedit, npedit_llava, npedit_lora
from npedit_jax import parallel
from npedit_jax.training import optimizer, stages, state

FULL = {"npedit": npedit, "npedit_llava": npedit_llava, "npedit_lora": npedit_lora}
SMALL = {"base": base, "scorer": scorer}


def abstract(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), parallel.AXES)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


@pytest.fixture(scope="module")
def networks():
    """Shapes of all parameters of all networks, by config."""
    return {
        name: {key: network.params for key, network in stages.abstract_networks(config.get_config()).items()}
        for name, config in (FULL | SMALL).items()
    }


def test_every_parameter_has_one_row_and_every_row_a_parameter(networks):
    idle = {pattern for pattern, _ in parallel.TABLE}
    for params in networks.values():
        for path in flatten_dict(params, sep="/"):
            _, _, path = path.partition("/")
            parallel.spec_of(path)  # raises where not exactly one matches
            idle -= {pattern.pattern for pattern, _ in parallel._PATTERNS if pattern.fullmatch(path)}
    assert not idle


@pytest.mark.parametrize("name", FULL)
def test_little_of_the_full_size_networks_stays_whole(networks, name):
    """Less than a thousandth of all parameters on 64 devices."""
    mesh, whole, total = abstract(1, 64, 1), 0, 0
    for params in networks[name].values():
        shardings = parallel.parameter_shardings(mesh, params)
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
            total += leaf.size
            whole += leaf.size if sharding.is_fully_replicated else 0
    assert whole < 1e-3 * total


def test_stacked_layers_are_split_inside_a_layer():
    mesh = abstract(1, 4, 2)
    sharding = parallel.parameter_sharding(mesh, "layers/attention/query/kernel", (30, 3840, 3840))
    assert sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert parallel.parameter_sharding(mesh, "layers/mlp/down/kernel", (2, 64, 24)).spec[1:] == ("tensor", "fsdp")


def test_axes_that_do_not_divide_are_left_out():
    mesh = abstract(1, 4, 2)
    spec = lambda *shape: parallel.parameter_sharding(mesh, "decoder/embedding/embedding", shape).spec  # noqa: E731
    assert spec(7, 16) == PartitionSpec(None, ("fsdp", "tensor"))
    assert spec(7, 12) == PartitionSpec(None, "fsdp")
    assert spec(7, 6) == PartitionSpec(None, "tensor")
    assert spec(7, 5) == PartitionSpec(None, None)


@pytest.mark.parametrize("path", ["layers/attention/queries/kernel", "kernel", "layers/attention/query/kernels"])
def test_parameter_without_a_row_is_an_error(path):
    with pytest.raises(ValueError, match=f"{path}.*exactly one row.*none"):
        parallel.spec_of(path)


def test_parameter_with_two_rows_is_an_error(monkeypatch):
    monkeypatch.setattr(parallel, "_PATTERNS", parallel._PATTERNS * 2)
    with pytest.raises(ValueError, match="exactly one row"):
        parallel.spec_of("layers/attention/query/kernel")
    with pytest.raises(ValueError, match="too few axes"):
        monkeypatch.undo()
        parallel.parameter_sharding(abstract(1, 2, 1), "layers/mlp/up/kernel", (4,))


@pytest.mark.parametrize(("rule", "moments"), [("adam", 2), ("muon", 1), ("no first moment", 1)])
def test_moments_and_averages_lie_as_their_parameter(rule, moments):
    mesh = abstract(1, 2, 2)
    params = {"student": {"layers": {"mlp": {"up": {"kernel": jnp.zeros((3, 8, 4))}}}}}
    settings = dict(learning_rate=optax.constant_schedule(0.1), b2=0.9, clip_norm=1.0, weight_decay=0.1)
    made = optimizer.build("muon" if rule == "muon" else "adam", b1=0.0 if rule[:2] == "no" else 0.9, **settings)
    start = jax.eval_shape(lambda: state.create(params, {"student": made}, ("student",)))
    found = state.shardings(mesh, start)
    expected = parallel.parameter_sharding(mesh, "layers/mlp/up/kernel", (3, 8, 4))
    assert expected.spec == PartitionSpec(None, "fsdp", "tensor")
    assert jax.tree.leaves(found.ema) == [expected]
    placed = zip(jax.tree.leaves(start.optimizer), jax.tree.leaves(found.optimizer), strict=True)
    large = [sharding for leaf, sharding in placed if leaf.shape == (3, 8, 4)]
    assert large == [expected] * moments


def test_mesh_takes_what_is_left_and_refuses_what_does_not_fit():
    devices = [Device(n, n // 2) for n in range(8)]
    assert parallel.make_mesh(-1, 2, 1, devices).devices.shape == (4, 2, 1)
    assert parallel.make_mesh(1, -1, 2, devices).devices.shape == (1, 4, 2)
    for sizes in ((3, -1, 1), (1, 1, 1), (-1, -1, 1), (0, 8, 1)):
        with pytest.raises(ValueError, match="config.mesh"):
            parallel.make_mesh(*sizes, devices)


def test_slices_lie_along_data():
    devices = [Device(n, n // 2, slice_index=n // 4) for n in range(8)]
    mesh = parallel.make_mesh(2, 4, 1, devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="2 slices .* multiple"):
        parallel.make_mesh(1, 8, 1, devices)


def places_of_hosts(monkeypatch, mesh, hosts):
    found = []
    for process in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(parallel.host_places(mesh))
    return found


def test_hosts_feed_disjoint_parts(monkeypatch):
    def shares(sizes, per_host):
        mesh = parallel.make_mesh(*sizes, [Device(n, n // per_host) for n in range(8)])
        return places_of_hosts(monkeypatch, mesh, 8 // per_host)

    assert shares((1, 8, 1), 4) == [((0, 1, 2, 3), 8), ((4, 5, 6, 7), 8)]
    assert shares((2, 4, 1), 2) == [((0, 1), 8), ((2, 3), 8), ((4, 5), 8), ((6, 7), 8)]
    assert shares((1, 2, 4), 2) == [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]  # two hosts hold one tensor axis
    with pytest.raises(ValueError, match="unevenly"):
        shares((1, 4, 2), 3)


def v5p(x: int, y: int, z: int) -> list[Device]:
    """A slice whose hosts have 2 x 2 x 1 chips each."""
    devices = []
    for number, (k, j, i) in enumerate(np.ndindex(z, y, x)):
        host = (i // 2) + (x // 2) * ((j // 2) + (y // 2) * k)
        devices.append(Device(number, host, 0, "tpu", "TPU v5p", (i, j, k)))
    return devices


def test_every_sample_reaches_its_device_where_a_pods_hosts_have_places_apart(monkeypatch):
    """Of the mesh of the full-size configs on v5p:4x4x4, whose hosts' places do not lie side by side."""
    mesh = parallel.make_mesh(4, 16, 1, v5p(4, 4, 4))
    given = places_of_hosts(monkeypatch, mesh, 16)
    assert any(own != tuple(range(own[0], own[0] + len(own))) for own, _ in given)
    samples, width = np.arange(2 * 128).reshape(2, 128), 2
    row = {device: place for place, device in enumerate(mesh.devices.flat)}
    reached = {}

    def take(shape, sharding, part):
        assert shape == samples.shape
        for device, place in row.items():
            if device.process_index == jax.process_index():
                index = (slice(None), slice(place * width, (place + 1) * width))
                reached[device] = part(index).tolist()

    monkeypatch.setattr(parallel, "batch_sharding", lambda mesh, leading_axes: None)
    monkeypatch.setattr(parallel, "_from_parts", take)
    for process, (own, _) in enumerate(given):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        fed = np.concatenate([samples[:, place * width : (place + 1) * width] for place in own], axis=1)
        parallel.put_batch({"weight": fed}, mesh, leading_axes=1)
    assert reached == {device: samples[:, p * width : (p + 1) * width].tolist() for device, p in row.items()}


def test_one_sample_per_host_is_still_its_own():
    """Where a host has one device and a batch one sample for each, no field is taken for the same everywhere."""
    mesh = parallel.make_mesh(1, 1, 1, jax.devices()[:1])
    placed = parallel.put_batch({"weight": np.ones((1,)), "negative_ids": np.ones((1, 3), np.int32)}, mesh)
    assert placed["weight"].sharding.spec == PartitionSpec(parallel.BATCH)
    assert placed["negative_ids"].sharding.spec == PartitionSpec()


def test_constraints_leave_values_alone():
    x = jnp.arange(12.0).reshape(3, 4)
    assert parallel.constrain_batch(x) is x
    with jax.set_mesh(parallel.make_mesh()):
        np.testing.assert_array_equal(jax.jit(parallel.constrain_batch)(x), x)
