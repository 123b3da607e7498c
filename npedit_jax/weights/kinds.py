"""The networks whose weights come from elsewhere, by the name a user picks, and the shapes of their parameters."""

import importlib
import types
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

# Kind -> the name, without suffix, that its library gives the weight files. The modules are imported on demand.
KINDS = {
    "zimage": "diffusion_pytorch_model",
    "autoencoder": "diffusion_pytorch_model",
    "qwen3": "model",
    "internvl": "model",
    "llava_onevision": "model",
}


def kind_module(kind: str) -> types.ModuleType:
    """Returns `npedit_jax.weights.<kind>`, which offers `build`, `describe`, `rows`, in some `spelled`.

    Raises:
      ValueError: no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of network {kind!r}; choose one of {list(KINDS)}")
    return importlib.import_module(f"npedit_jax.weights.{kind}")


def build(kind: str, config: dict[str, Any], **module_options: Any) -> nn.Module:
    """Builds the Flax module of a Hugging Face `config.json`; raises ValueError on an unknown kind or setting."""
    make = kind_module(kind).build
    try:
        return make(config, **module_options)
    except (KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        raise ValueError(
            f"the config describes no network of kind {kind!r}: {type(error).__name__}: {error}"
        ) from error


def parameter_shapes(kind: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its "/"-joined path; nothing is computed or allocated."""
    if getattr(module, "answer_ids", ()) is None:
        module = module.clone(answer_ids=(0, 1))  # whichever tokens answer, the parameters are the same
    variables = jax.eval_shape(module.init, jax.random.key(0), *example_inputs(kind, module))
    flat = flax.traverse_util.flatten_dict(nn.unbox(variables["params"]), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def spelled(kind: str, module: nn.Module, names: Collection[str]) -> nn.Module:
    """Returns the module with the spelling that a checkpoint's tensor names have, where several are in use."""
    own = getattr(kind_module(kind), "spelled", None)
    return own(module, names) if own else module


def example_inputs(kind: str, module: nn.Module) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the smallest arguments that a call of the module takes (`module.init` traces one)."""

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    if kind == "zimage":
        latents = array(1, module.patch_size, module.patch_size, module.channels)
        return latents, array(1), array(1, 1, module.text_width), array(1, 1, dtype=bool)
    if kind == "autoencoder":
        return (array(1, module.downscale, module.downscale, module.image_channels),)
    if kind == "qwen3":
        return array(1, 1, dtype=jnp.int32), array(1, 1, dtype=bool)
    token_ids, mask, image_index = (array(1, 1, 2, dtype=dtype) for dtype in (jnp.int32, bool, jnp.int32))
    return array(1, 1, 2, 2, 3), token_ids, mask, image_index
