"""FLOPs of the instructions that multiply: dots, convolutions, and the flash attention kernels."""

import functools
import math
import re

import numpy as np

from npedit_jax.compilation.hlo_text import Computation, Instruction


def flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of one run of an instruction; 0 of one that multiplies no matrices."""
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call" and is_kernel(instruction):
        return _kernel(computation, instruction)
    return 0.0


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel."""
    return "tpu_custom_call" in instruction.attributes


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _dot(computation: Computation, instruction: Instruction) -> float:
    left = computation[instruction.operands[0]].results[0].shape
    contracted = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    return 2.0 * math.prod(instruction.results[0].shape) * math.prod(left[i] for i in contracted)


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Products with a real input only: neither padding nor the holes of a dilated input count.

    The TPU compiler writes matrix products as convolutions, batched ones with the batch as a dilated dimension.
    """
    left, right = (computation[name].results[0].shape for name in instruction.operands[:2])
    out = instruction.results[0].shape
    of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    for position, label in enumerate(sorted(set(of_out) - {"b", "f"})):
        pick = lambda name, default: int(fields[name].split("x")[position]) if name in fields else default  # noqa: E731, B023
        low = int(fields["pad"].split("x")[position].split("_")[0]) if "pad" in fields else 0
        pairs *= _valid_pairs(
            left[of_left.index(label)], right[of_right.index(label)], out[of_out.index(label)],
            pick("stride", 1), low, pick("lhs_dilate", 1), pick("rhs_dilate", 1),
        )  # fmt: skip
    groups = int((re.search(r"batch_group_count=(\d+)", instruction.attributes) or [0, 1])[1])
    features, batch = right[of_right.index("i")], left[of_left.index("b")]
    return 2.0 * features * out[of_out.index("f")] * (batch // groups) * pairs


@functools.cache
def _valid_pairs(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """Pairs of an output and a kernel position that meet an element of the input."""
    places = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * kernel_dilate
    return int(((places >= 0) & (places <= (size - 1) * dilate) & (places % dilate == 0)).sum())


def _kernel(computation: Computation, instruction: Instruction) -> float:
    """Of the flash attention kernels, by their name: two products forward, three and four of the two backward ones."""
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.attributes + instruction.name)
    if not found:
        return 0.0
    arrays = [a for name in instruction.operands for a in computation[name].results if a.dtype in ("bf16", "f32")]
    queries, keys = (next(a.shape for a in arrays[i:] if len(a.shape) >= 3) for i in (0, 1))
    pairs = math.prod(queries[:-2]) * queries[-2] * keys[-2] * queries[-1]
    return {"fwd": 4.0, "dq": 6.0, "dkv": 8.0}[found[1]] * pairs
