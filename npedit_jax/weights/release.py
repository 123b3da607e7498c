"""The editor as the PyTorch release of NP-Edit keeps it: one flat state dict of its `ZImageDenoiser`.

That module holds diffusers' transformer as its attribute `transformer` and no other parameters or buffers, and the
release's script loads the dictionary with strict=True (`models/zimage_denoiser.py`, `scripts/edit.py`).
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from npedit_jax import atomic
from npedit_jax.models.denoiser import Denoiser
from npedit_jax.weights import saving, zimage
from npedit_jax.weights.safetensors_io import Reader, read_header, write_file

PREFIX = "transformer."
# The release masks pad tokens or lets them attend depending on the attention it finds installed, not on the weights.
FREE_OPTIONS = {"pad_tokens"}


def save_release(module: Denoiser, params: Mapping[str, Any], file: epath.PathLike, dtype: str | None = None) -> None:
    """Writes the state dict as one safetensors file, which appears whole or not at all.

    In a run of several processes all must call this; the first one writes.

    Args:
      params: as for `weights.save`.
      file: must not exist.
      dtype: to convert parameters to ("bfloat16", ...); None keeps theirs.

    Raises:
      FileExistsError: the file is there.
      ValueError: the module has options that the release does not know, or parameters do not fit the module.
    """
    file = epath.Path(file)
    if file.exists():
        raise FileExistsError(f"{file} is there already; give a new directory, or delete it first")
    if unknown := sorted(set(zimage.describe(module).get("npedit", {})) - FREE_OPTIONS):
        raise ValueError(
            f"the PyTorch release of NP-Edit has no {' and no '.join(unknown)}, which this editor was trained with: it "
            "would make other pictures of these weights; export --format diffusers, for npedit_jax/pytorch/edit.py"
        )
    planned, values = saving.source_tensors("zimage", module, params, dtype)
    if jax.process_index() == 0:
        named = [dataclasses.replace(tensor, name=PREFIX + tensor.name) for tensor in planned]
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic.file(file) as partial:
            write_file(partial, named, values)
    else:
        collections.deque(values, maxlen=0)  # gathering is a collective, see `saving.save`


def pickle_release(source: epath.PathLike, file: epath.PathLike) -> None:
    """Writes what `save_release` wrote as the .pt file that the release's script opens; holds all of it in memory.

    Raises:
      FileExistsError: the file is there.
      ImportError: PyTorch is not installed.
    """
    import torch

    source, file = epath.Path(source), epath.Path(file)
    if file.exists():
        raise FileExistsError(f"{file} is there already; give a new directory, or delete it first")

    def tensor(value: np.ndarray) -> torch.Tensor:
        # Through bytes: NumPy's bfloat16 is a type that PyTorch does not know.
        raw = torch.from_numpy(value.reshape(-1).view(np.uint8).copy())
        return raw.view(getattr(torch, value.dtype.name)).reshape(value.shape)

    with Reader() as reader:
        state = {name: tensor(reader.read(entry)) for name, entry in read_header(source).items()}

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(file) as partial, partial.open("wb") as stream:
        torch.save(state, stream)
