"""Memory of the full-size denoiser's forward pass on a TPU slice, compiled without a TPU:
`python benchmarks/denoiser_memory.py --implementation splash [--json FILE]`.

One sample a device, a caption of 512 tokens, parameters in bfloat16 and split over all devices.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp

from npedit_jax import chips, flops, parallel
from npedit_jax.compilation import report
from npedit_jax.compilation.programs import Compilable, shard_bytes
from npedit_jax.models.denoiser import Denoiser
from npedit_jax.training import networks

CAPTION, PIXELS = 512, 8  # tokens; along the side of what a latent stands for


def program(implementation: str, side: int, mesh: jax.sharding.Mesh) -> tuple[Compilable, int]:
    """The forward pass on latents of side x side pixels, and the bytes of its parameters on a device."""
    module = Denoiser(implementation=implementation, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = networks.shapes("zimage", module)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        parallel.parameter_shardings(mesh, shapes),
    )

    def sample(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=parallel.batch_sharding(mesh))

    inputs = (
        sample(side // PIXELS, side // PIXELS, module.channels),
        sample(),
        sample(CAPTION, module.text_width, dtype=jnp.bfloat16),
        sample(CAPTION, dtype=bool),
    )
    apply = lambda module: lambda params, *inputs: module.apply({"params": params}, *inputs)  # noqa: E731
    forward = jax.jit(apply(module), out_shardings=parallel.batch_sharding(mesh))
    return Compilable(forward, apply(flops.plain(module)), (params, *inputs), inputs, 1.0), shard_bytes(params)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v6e:2x4")
    parser.add_argument("--implementation", default="splash", help="of attention")
    parser.add_argument("--side", type=int, default=1024, help="of the picture, in pixels")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    mesh = parallel.make_mesh(1, -1, 1, chips.devices_of(arguments.topology))
    made, resident = program(arguments.implementation, arguments.side, mesh)
    found = report.compile_program(made, mesh, chips.chip_of(arguments.topology), resident)
    print(*report.program_lines(arguments.implementation, found, chips.chip_of(arguments.topology).memory), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(vars(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
