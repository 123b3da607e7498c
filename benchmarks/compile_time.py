"""Trace and compile time of the denoiser against its depth: `python benchmarks/compile_time.py`.

Times `jax.jit(...).lower(...)` and `.compile()` of the reference path and its gradients at 3 and at 30 layers, in
processor seconds of this process, in turns, and takes the smallest of each. Exits with 1 where 30 layers take more than
1.5 times as long as 3.
"""

import argparse
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from npedit_jax.models.denoiser import Denoiser

BOUND = 1.5
DEPTHS = (3, 30)


def program(depth: int, width: int) -> tuple[Callable[..., jax.Array], tuple[jax.ShapeDtypeStruct, ...]]:
    """Gradients of the reference path by the parameters, and its arguments, shapes only."""
    head = width // 4
    rope_widths = (head // 4, head // 8 * 3, head // 8 * 3)
    denoiser = Denoiser(
        width=width, depth=depth, heads=4, text_width=width, rope_widths=rope_widths, remat="full", dtype=jnp.bfloat16
    )
    shape = jax.ShapeDtypeStruct
    latents = shape((2, 16, 16, 16), jnp.float32)
    inputs = (latents, shape((2,), jnp.float32), shape((2, 64, width), jnp.float32), shape((2, 64), bool), latents)
    params = jax.eval_shape(denoiser.init, jax.random.key(0), *inputs)["params"]
    gradients = jax.grad(lambda params, *inputs: jnp.square(denoiser.apply({"params": params}, *inputs)).mean())
    return gradients, (params, *inputs)


def seconds(depth: int, width: int) -> tuple[float, float]:
    """Of tracing and lowering, and of compiling, from nothing."""
    jax.clear_caches()
    function, arguments = program(depth, width)
    start = time.process_time()
    lowered = jax.jit(function).lower(*arguments)
    traced = time.process_time()
    lowered.compile()
    return traced - start, time.process_time() - traced


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="of the model; a multiple of 32")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    seconds(DEPTHS[0], arguments.width)  # the first call of a process also initialises what it uses
    runs = {depth: [] for depth in DEPTHS}
    for _ in range(arguments.repeats):
        for depth in DEPTHS:
            runs[depth].append(seconds(depth, arguments.width))
    best = {depth: [min(times) for times in zip(*pairs, strict=True)] for depth, pairs in runs.items()}
    for depth, (trace, compile_) in best.items():
        print(f"{depth} layers: trace {trace:.2f} s, compile {compile_:.2f} s")
    shallow, deep = (sum(best[depth]) for depth in DEPTHS)
    print(f"ratio {deep / shallow:.2f}; the bound is {BOUND}")
    if deep > BOUND * shallow:
        sys.exit("compile_time: the bound is missed")


if __name__ == "__main__":
    main()
