"""Comparison with PyTorch modules through the mapping tables: parameters and their gradients, tensor by tensor."""

import flax.traverse_util
import jax
import numpy as np
import torch

from npedit_jax.weights.table import Row

FORWARD = 2e-5  # relative L2
GRADIENT = 1e-4
# Of the whole network's gradient norm: a key bias has a gradient of exactly zero but for rounding.
GRADIENT_FLOOR = 1e-6


def relative(found, expected) -> float:
    """Relative L2 difference."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter with noise, so that zero or one initialisations hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1) * 0.5)
    return module.eval()


def fill(shapes, seed: int = 0):
    """Parameters of these shapes full of noise; an initialisation takes seconds to compile, and leaves biases zero."""
    rng = np.random.default_rng(seed)

    def noise(path, x):
        name = path[-1].key
        scale = 0.2 if name in ("bias", "scale") or name.endswith("_scale") else np.prod(x.shape[-2:-1]) ** -0.5
        return (rng.normal(size=x.shape) * scale + ("scale" in name)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(noise, shapes)


def to_flax(table: list[Row], tensors: dict[str, np.ndarray]) -> dict:
    """Parameters (or gradients) in our layout; every tensor has to be used, unused rows are left out."""
    flat, seen = {}, set()
    for row in table:
        seen.update(row.names())
        if row.unused:
            continue
        arrays = [row.to_flax(tensors[name]) for name in row.names()]
        flat[row.target] = np.stack(arrays) if row.layers else arrays[0]
    assert tensors.keys() <= seen, tensors.keys() - seen
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def assert_gradients(found, expected) -> None:
    """Compares two trees of gradients leaf by leaf."""
    found, expected = (flax.traverse_util.flatten_dict(dict(x), sep="/") for x in (found, expected))
    assert found.keys() == expected.keys()
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in expected.values()))
    for path, value in expected.items():
        difference = np.linalg.norm(np.asarray(found[path], np.float64) - value)
        assert difference <= GRADIENT * np.linalg.norm(value) + GRADIENT_FLOOR * norm, path


def count(shapes) -> int:
    """Number of parameters in a tree of shapes."""
    return sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(shapes))
