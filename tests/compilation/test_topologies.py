"""The TPU compiler on a machine without TPU, where libtpu is installed: meshes, collectives, flags, the kernel."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")
ROOT = pathlib.Path(__file__).parents[2]
# libtpu is loaded in a process of its own: the tests' own process stays without it. Programs for chips that are not
# here are not kept.
ENVIRONMENT = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
HEADER = """
import functools, re, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from npedit_jax import chips, parallel
from npedit_jax.compilation import hlo
from npedit_jax.models import layers

def work(topology, data, width, slices=1):
    mesh = parallel.make_mesh(data, -1, 1, chips.devices_of(topology, slices))
    def loss(w, x):
        def layer(x, w):
            return jnp.tanh(parallel.constrain_batch(x) @ w.astype(jnp.bfloat16)), None
        return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32))
    place = lambda *axes: NamedSharding(mesh, P(*axes))
    w = jax.ShapeDtypeStruct((4, width, width), jnp.float32, sharding=place(None, "fsdp"))
    x = jax.ShapeDtypeStruct((mesh.size, 256, width), jnp.bfloat16, sharding=place(("data", "fsdp")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss), out_shardings=w.sharding).lower(w, x).compile()
    return hlo.Program(compiled.as_text()).work(mesh.shape)

kinds = lambda work: {(c.kind, c.axes) for c in work.collectives if c.times > 1}
"""


def run(script: str) -> None:
    command = [sys.executable, "-c", HEADER + script]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_parameters_are_gathered_and_gradients_scattered_over_fsdp_and_summed_over_data():
    """8 rows of a tile each: with fewer the compiler adds shards up instead (docs/pods.md)."""
    run("""
found = work("v5e:4x4", 4, 512)
assert kinds(found) == {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",)), ("all-reduce", ("data",))}, found
assert found.flops == 3 * 2 * 4 * 256 * 512**2, found.flops
assert max(c.bytes for c in found.collectives if c.kind == "all-gather") == 512 * 512 * 2
""")


def test_slices_exchange_over_data_alone():
    run("""
mesh = parallel.make_mesh(2, -1, 1, chips.devices_of("v5e:2x2", 2))
assert mesh.shape == {"data": 2, "fsdp": 4, "tensor": 1}
assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
found = work("v5e:2x4", 4, 512, slices=2)  # two copies in each slice
between = [c for c in found.collectives if c.between_slices]
assert {(c.kind, c.group) for c in between} == {("all-reduce", 2)} and sum(c.times for c in between) == 4, found
assert ("data",) in {c.axes for c in found.collectives if not c.between_slices}, found
""")


def test_flags_of_the_launch_script_are_known_to_the_compiler():
    run("""
mesh = parallel.make_mesh(1, -1, 1, chips.devices_of("v6e:2x2"))
x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
lowered = jax.jit(lambda x: x @ x).lower(x)
flags = re.findall(r"^ +--(\\S+)=(\\S+)", open("launch/pod/xla_flags.sh").read(), re.M)
assert len(flags) > 4
lowered.compile(compiler_options=dict(flags))
try:
    lowered.compile(compiler_options={"xla_tpu_no_such_flag": "true"})
except jax.errors.JaxRuntimeError as error:
    assert "No such compile option" in str(error)
else:
    raise AssertionError("an unknown flag was taken")
""")


def test_flash_attention_compiles_for_a_mesh_and_its_products_are_counted():
    run("""
mesh = parallel.make_mesh(2, 2, 1, chips.devices_of("v5e:2x2"))
x = jax.ShapeDtypeStruct((4, 1500, 2, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
attend = functools.partial(layers.attention, implementation="splash")
with jax.set_mesh(mesh):
    gradients = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32)), argnums=(0, 1, 2))
    found = hlo.Program(jax.jit(gradients).lower(x, x, x).compile().as_text()).work(mesh.shape)
# One sample a device, padded to 1536 tokens: two products forward, three and four backward.
assert found.flops == 2 * (2 + 3 + 4) * 2 * 1536**2 * 128, found.flops / (2 * 2 * 1536**2 * 128)
assert not found.collectives
with jax.set_mesh(mesh):  # a mask that is the same for all samples
    jax.jit(lambda q, k, v: attend(q, k, v, jnp.ones((1, 1, 1, 1500), bool))).lower(x, x, x).compile()
""")


def test_unknown_size_is_told_in_one_line():
    command = [sys.executable, "-m", "npedit_jax.compile", "--config=configs/zimage/warmup.py", "--topology=v5p:3x5x7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "compile: no TPU compiler for v5p:3x5x7" in done.stderr


def test_ids_are_looked_up_within_a_copy_of_the_table():
    """No device sees other copies' samples, forward or backward; only the table's gradient is summed over copies."""
    run("""
from npedit_jax.models.language import Decoder
mesh = parallel.make_mesh(4, -1, 1, chips.devices_of("v5e:4x4"))
types = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
decoder = Decoder(vocabulary=1500, width=512, layers=1, heads=4, kv_heads=4, head_width=128, mlp_width=512, **types)
place = parallel.parameter_sharding(mesh, "embedding/embedding", (1500, 512))
table = jax.ShapeDtypeStruct((1500, 512), jnp.bfloat16, sharding=place)
ids = jax.ShapeDtypeStruct((32, 64), jnp.int32, sharding=parallel.batch_sharding(mesh))
embed = lambda table, ids: decoder.apply({"params": {"embedding": {"embedding": table}}}, ids, method="embed")
loss = lambda table, ids: jnp.sum(jnp.sin(embed(table, ids).astype(jnp.float32)))
with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss), out_shardings=place).lower(table, ids).compile()
found = hlo.Program(compiled.as_text()).work(mesh.shape).collectives
assert {c.axes for c in found if c.kind != "all-reduce"} == {("fsdp",)}, found
assert max(c.bytes for c in found if c.kind != "all-reduce") <= 8 * 64 * 512 * 2, found
assert {(c.axes, c.shape) for c in found if c.kind == "all-reduce"} == {(("data",), (1500, 128))}, found
""")


def test_state_in_the_hosts_memory_is_brought_in_by_the_program():
    run("""
mesh = parallel.make_mesh(1, 4, 1, chips.devices_of("v5e:2x2"))
there = NamedSharding(mesh, P("fsdp"), memory_kind="pinned_host")
x = jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=there)
program = jax.jit(lambda x: parallel.on_devices(x) * 2.0, out_shardings=there, donate_argnums=0)
with jax.set_mesh(mesh):
    memory = program.lower(x).compile().memory_analysis()
assert memory.host_argument_size_in_bytes == 4096 * 1024 and memory.argument_size_in_bytes == 0, memory
assert memory.host_output_size_in_bytes == 4096 * 1024, memory
""")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "fits"), [("64x64", True), ("16384x16384", False)])
def test_the_tool_tells_by_its_status_whether_a_run_fits(tmp_path, size, fits):
    (tmp_path / "config.py").write_text("from tests.training.tiny_networks import lora_config as get_config\n")
    command = [sys.executable, "-m", "npedit_jax.compile", f"--config={tmp_path / 'config.py'}", "--topology=v5e:2x2"]
    command += ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.batch_size=4", "--only=sample"]
    command += [f"--size={size}", f"--json={tmp_path / 'report.json'}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == (0 if fits else 1), done.stderr
    assert ("does not fit on v5e:2x2" in done.stderr) == ("DOES NOT FIT: sample" in done.stdout) == (not fits)
    assert json.loads((tmp_path / "report.json").read_text())["fits"] == fits
