"""A trained editor to call from Python: pictures and instructions in, pictures out.

    editor = npedit_jax.Editor.from_checkpoint("runs/easyvqa")
    edited = editor(image, "make the circle red", seed=0)

Shapes: B batch, H height, W width, L text tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from PIL import Image, ImageOps

from npedit_jax import export, sampling
from npedit_jax.data.tokenize import TextTokenizer
from npedit_jax.pixels import to_pixels, to_uint8
from npedit_jax.training import networks, workdirs

NETWORKS = ("autoencoder", "text_encoder", "student")
SEEDS = 2**32  # a seed is the 32 bits that make a key


class Editor:
    """The networks that edit, with one compiled program per image size and batch size.

    What an edit's noise is depends on its seed alone, not on what else is in the batch.

    Args:
      made: the networks named in NETWORKS.
      tokenizer: of the text encoder.
      settings: `times`, `sampler` and `eta` of `sampling.edit`.
    """

    def __init__(self, made: Mapping[str, networks.Network], tokenizer: TextTokenizer, settings: Mapping[str, Any]):
        self._modules = {name: made[name].module for name in NETWORKS}
        self._params = {name: made[name].params for name in NETWORKS}
        self._tokenizer = tokenizer
        self._settings = dict(settings)
        self._program = jax.jit(self._edit)

    @classmethod
    def from_checkpoint(cls, run_directory: epath.PathLike, *, raw: bool = False) -> "Editor":
        """Loads the editor that a training run has come to.

        Args:
          run_directory: the working directory of a run that trains a student.
          raw: the newest parameters as trained instead of their average.

        Raises:
          WorkdirError: the directory is no run of an editor, or has no checkpoint yet.
          FileNotFoundError, ValueError: the weights of a frozen network are missing or do not fit.
        """
        config = _read_config(run_directory)
        made = export.trained_networks(run_directory, raw=raw)
        frozen = [name for name in NETWORKS if name not in made]
        made |= {name: networks.create(config.networks[name], rng=None) for name in frozen}
        tokenizer = TextTokenizer(networks.resolve(config.data.text_tokenizer), config.data.text_length)
        return cls(made, tokenizer, config.sampling.to_dict())

    def check(self, width: int, height: int, instruction: str, seed: int = 0) -> None:
        """Checks one request without computing anything.

        Raises:
          ValueError: a size that the networks cannot take, an instruction with unknown words or too many of them, or
            a seed out of range.
        """
        self._check_size(width, height)
        self._tokenize([instruction])
        _check_seeds([seed])

    def __call__(self, image: Image.Image, instruction: str, seed: int = 0) -> Image.Image:
        """Edits one picture, which is taken upright and as RGB; raises ValueError as `check` does."""
        pixels = np.asarray(upright(image))
        return Image.fromarray(self.edit_batch(pixels[None], [instruction], [seed])[0])

    def edit_batch(
        self,
        images: np.ndarray,
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Edits pictures of one size.

        Args:
          images: uint8 [B, H, W, 3].
          instructions: B texts.
          seeds: B whole numbers in [0, 2^32).
          batch_size: how many go through the networks at a time, the last ones filled up to it; by default all.

        Returns:
          uint8 [B, H, W, 3].

        Raises:
          ValueError: as `check`, or arguments of other shapes and lengths.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected images uint8 [B, H, W, 3], found {images.dtype} {list(images.shape)}")
        count = len(images)
        if not count == len(instructions) == len(seeds):
            raise ValueError(
                f"expected as many instructions and seeds as images, found {count} images, {len(instructions)} "
                f"instructions and {len(seeds)} seeds"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        if not count:
            return images.copy()
        self._check_size(width=images.shape[2], height=images.shape[1])
        _check_seeds(seeds)
        inputs = (images, *self._tokenize(instructions), np.asarray(seeds, np.uint32))
        size = batch_size or count
        edited = np.empty_like(images)
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            edited[rows] = self._program(self._params, *(x[rows] for x in inputs))
        return edited

    def _edit(
        self, params: Mapping[str, Any], images: jax.Array, ids: jax.Array, mask: jax.Array, seeds: jax.Array
    ) -> jax.Array:
        """Pixels to pixels, uint8 [B, H, W, 3]; this is what is compiled."""
        autoencoder, variables = self._modules["autoencoder"], {"params": params["autoencoder"]}
        reference = autoencoder.apply(variables, to_pixels(images), method="encode")
        text = sampling.encode_text(self._modules, params, ids, mask)
        rngs = jax.vmap(jax.random.key)(seeds)
        latents = sampling.edit(self._modules["student"], params["student"], reference, text, rngs, **self._settings)
        return to_uint8(autoencoder.apply(variables, latents, method="decode"))

    def _check_size(self, width: int, height: int) -> None:
        student = self._modules["student"]
        multiple = 2 ** (len(self._modules["autoencoder"].block_out_channels) - 1) * student.patch_size
        _, rows, columns = student.rope_lengths
        fits = 0 < width <= columns * multiple and 0 < height <= rows * multiple
        if not fits or width % multiple or height % multiple:
            raise ValueError(
                f"the image is {width}x{height} pixels (width x height); this editor takes sides that are multiples of "
                f"{multiple}, at most {columns * multiple}x{rows * multiple}; resize or crop it"
            )

    def _tokenize(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, each [B, L]."""
        tokens = self._tokenizer(instructions)
        if tokens.cut.any():
            text = instructions[int(tokens.cut.argmax())]
            raise ValueError(
                f"the instruction {text!r} is longer than {self._tokenizer.length} tokens with the prompt around it; "
                "shorten it"
            )
        return tokens.ids, tokens.mask


def upright(image: Image.Image) -> Image.Image:
    """The picture in RGB, turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(image).convert("RGB")


def _read_config(run_directory: epath.PathLike) -> ml_collections.ConfigDict:
    """The config of a run, which must be one of an editor: other directories have a config.json as well."""
    try:
        config = workdirs.read_config(run_directory)
    except ValueError as error:
        if isinstance(error, workdirs.WorkdirError):
            raise
        raise workdirs.WorkdirError(f"{run_directory} is no run: its config.json is damaged ({error})") from error
    if not {"networks", "optimizer", "sampling", "data"} <= set(config):
        raise workdirs.WorkdirError(
            f"{run_directory} is no run of an editor: its config.json is not one of a run that edits; "
            "give the --workdir of a run of stage npedit or warmup"
        )
    if missing := [name for name in NETWORKS if name not in config.networks]:
        raise workdirs.WorkdirError(
            f"{run_directory} is no run of an editor: it has no {' and no '.join(missing)}; "
            "give the --workdir of a run of stage npedit or warmup"
        )
    return config


def _check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise ValueError(f"a seed is a whole number from 0 to {SEEDS - 1}, found {seed}")
