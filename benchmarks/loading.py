"""Host memory while a checkpoint loads: `python benchmarks/loading.py`.

Writes a checkpoint of Z-Image's widths and fewer layers (4.3 GB in bfloat16) to a temporary directory, loads it in a
process of its own, and reports what that process held at its peak beyond the loaded parameters, against 1.5 times the
largest stacked parameter. Devices are the CPU's here, so that what they hold counts as host memory and is subtracted.
Linux; exits with 1 where the bound is missed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from npedit_jax import weights
from npedit_jax.weights import kinds, zimage
from npedit_jax.weights.safetensors_io import DTYPES, Planned, write_file

BOUND = 1.5
GB = 1e9
NOISE_VALUES = 1 << 22


def write_checkpoint(directory: pathlib.Path, layers: int) -> int:
    """Writes config.json and one file of bfloat16 noise, a tensor at a time; returns its bytes."""
    module = kinds.build("zimage", {"n_layers": layers})
    shapes = kinds.parameter_shapes("zimage", module)
    planned = [
        Planned(name, DTYPES["BF16"], row.source_shape(shapes[row.target][bool(row.layers) :]))
        for row in zimage.rows(module)
        for name in row.names()
    ]
    noise = np.random.default_rng(0).normal(size=NOISE_VALUES).astype(DTYPES["BF16"])
    write_file(
        epath.Path(directory) / "diffusion_pytorch_model.safetensors",
        planned,
        (np.resize(noise, tensor.shape) for tensor in planned),
    )
    (directory / "config.json").write_text(json.dumps(zimage.describe(module)))
    return sum(tensor.bytes for tensor in planned)


def measure(directory: str, dtype: str | None) -> dict[str, float]:
    """Loads the checkpoint here, kernels sharded over all devices, and returns bytes and seconds."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))

    def place(path: str) -> NamedSharding:
        spec = PartitionSpec(None, None, "fsdp") if path.startswith("layers/") and "kernel" in path else PartitionSpec()
        return NamedSharding(mesh, spec)

    jax.block_until_ready(jax.device_put(np.zeros(8), NamedSharding(mesh, PartitionSpec())))
    before, start = _memory("VmRSS"), time.perf_counter()
    _, params = weights.load("zimage", directory, dtype, place)
    seconds, peak = time.perf_counter() - start, _memory("VmHWM")
    leaves = jax.tree.leaves(params)
    # CPU devices that hold the same values share one buffer.
    buffers = {x.data.unsafe_buffer_pointer(): x.data.nbytes for leaf in leaves for x in leaf.addressable_shards}
    held = sum(buffers.values())
    return {
        "held": held,
        "largest": max(leaf.nbytes for leaf in leaves),
        "over": peak - before - held,
        "seconds": seconds,
    }


def _memory(field: str) -> int:
    """Bytes of a field of this process's status: VmRSS is now, VmHWM the highest so far."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of width 3840, 0.36 GB each; refiners are four more")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices that kernels are sharded over")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="to load as")
    parser.add_argument("--directory", help="where to make the temporary directory")
    parser.add_argument("--measure", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        written = write_checkpoint(pathlib.Path(directory), arguments.layers)
        print(f"checkpoint: {written / GB:.2f} GB, {arguments.layers} layers of width 3840")
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
        command = [sys.executable, __file__, "--measure", directory, "--dtype", arguments.dtype]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)
    ratio = figures["over"] / figures["largest"]
    print(f"loaded: {figures['held'] / GB:.2f} GB on {arguments.devices} device(s) in {figures['seconds']:.0f} s")
    print(f"largest stacked parameter: {figures['largest'] / GB:.3f} GB")
    print(
        f"peak beyond what is loaded: {figures['over'] / GB:.3f} GB, {ratio:.2f} of the largest; the bound is {BOUND}"
    )
    if ratio > BOUND:
        sys.exit("loading: the bound is missed")


if __name__ == "__main__":
    main()
