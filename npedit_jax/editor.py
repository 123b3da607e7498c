"""A trained editor, ready for pictures: pixels and instructions in, edited pixels out."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from npedit_jax import export, sampling
from npedit_jax.data.tokenize import TextTokenizer
from npedit_jax.training import networks, workdirs
from npedit_jax.training.previews import to_uint8
from npedit_jax.training.steps import to_pixels

BATCH = 32


class Editor:
    """Edits images by the student of a training run.

    One program is compiled per image size and number of samples; the noise of a sample follows from its seed alone.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        params: Mapping[str, Any],
        tokenizer: TextTokenizer,
        settings: Mapping[str, Any],
    ):
        """Takes the networks `student`, `text_encoder` and `autoencoder`, and `times`, `sampler` and `eta`."""
        self._modules, self._params, self._tokenizer = modules, params, tokenizer
        self._settings = {"times": tuple(settings["times"]), "sampler": settings["sampler"], "eta": settings["eta"]}
        self._edit = jax.jit(self._program)

    @classmethod
    def from_checkpoint(cls, run: epath.PathLike, *, raw: bool = False) -> "Editor":
        """The editor of a run's newest checkpoint: its average, or with `raw` the parameters as trained.

        Raises:
          WorkdirError: the directory is no run, trains no student, or has no checkpoint yet.
        """
        config = workdirs.read_config(run)
        if "student" not in config.optimizer:
            raise workdirs.WorkdirError(
                f"{run} is a run of stage {config.stage!r}, which trains no editor; "
                "give one of stage 'warmup' or 'npedit'"
            )
        made = {
            name: networks.create(config.networks[name], jax.random.key(0)) for name in ("autoencoder", "text_encoder")
        }
        made |= export.trained_networks(run, raw=raw)
        return cls(
            {name: network.module for name, network in made.items()},
            {name: network.params for name, network in made.items()},
            text_tokenizer(config),
            config.sampling,
        )

    def __call__(self, image: Image.Image, instruction: str, seed: int = 0) -> Image.Image:
        """Edits one picture; the result has its size."""
        pixels = np.asarray(image.convert("RGB"))
        return Image.fromarray(self.edit_batch(pixels[None], [instruction], [seed])[0])

    def edit_batch(self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Edits pictures of one size, each by its own instruction.

        Args:
          images: uint8 [B, H, W, 3].
          seeds: of each sample's noise.

        Returns:
          uint8 [B, H, W, 3].

        Raises:
          ValueError: a size that the networks cannot take, an instruction too long or with unknown words.
        """
        self._check_size(images.shape[1:3])
        tokens = self._tokenizer(list(instructions))
        if tokens.cut.any():
            raise ValueError(f"the instruction is too long: {instructions[int(tokens.cut.argmax())]!r}")
        keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
        edited = self._edit(self._params, np.asarray(images), tokens.ids, tokens.mask, keys)
        return to_uint8(edited)

    def _program(self, params: Mapping[str, Any], images: Any, ids: Any, mask: Any, keys: jax.Array) -> jax.Array:
        autoencoder, variables = self._modules["autoencoder"], {"params": params["autoencoder"]}
        reference = autoencoder.apply(variables, to_pixels(images), method="encode")
        text = sampling.encode_text(self._modules, params, ids, mask)
        latents = sampling.edit(self._modules["student"], params["student"], reference, text, keys, **self._settings)
        return autoencoder.apply(variables, latents, method="decode")

    def _check_size(self, size: tuple[int, int]) -> None:
        student = self._modules["student"]
        unit = 2 ** (len(self._modules["autoencoder"].block_out_channels) - 1) * student.patch_size
        longest = [unit * length for length in student.rope_lengths[1:]]
        if any(side % unit or side > most for side, most in zip(size, longest, strict=True)):
            raise ValueError(
                f"this editor takes images whose height and width are multiples of {unit}, up to {longest[0]} x "
                f"{longest[1]}; this one is {size[0]} x {size[1]}: resize it first"
            )


def text_tokenizer(config: ml_collections.ConfigDict) -> TextTokenizer:
    """The tokenizer of a run's instructions."""
    return TextTokenizer(networks.resolve(config.data.text_tokenizer), config.data.text_length)
