"""A trained editor to call from Python: pictures and instructions in, pictures out.

    editor = npedit_jax.Editor.from_checkpoint("runs/easyvqa")
    edited = editor(image, "make the circle red", seed=0)

A picture of any size is brought to one that the networks take: the bucket of the training run most like it in shape, or
with `fit="multiple"`, and where the run had no buckets, the nearest multiples of what a latent pixel and a patch cover.

Shapes: B batch, H height, W width, L text tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from npedit_jax import export, parallel, pictures, sampling
from npedit_jax.data import buckets as buckets_lib
from npedit_jax.data import questions
from npedit_jax.data.tokenize import TextTokenizer
from npedit_jax.pixels import to_uint8
from npedit_jax.training import networks, workdirs

NETWORKS = ("autoencoder", "text_encoder", "student")
FITS = ("bucket", "multiple")
TASKS = tuple(questions.TASK_PREFIXES)
SEEDS = 2**32  # a seed is the 32 bits that make a key


class Editor:
    """The networks that edit, with one compiled program per image size and batch size.

    What an edit's noise is depends on its seed alone, not on what else is in the batch. Batches are spread over the
    devices of this process, each of which holds all parameters.

    Args:
      made: the networks named in NETWORKS.
      tokenizer: of the text encoder.
      settings: `times`, `sampler` and `eta` of `sampling.edit`.
      buckets: sizes (height, width) of the training run.
      fit: "bucket", or "multiple" to keep a picture's shape more closely than the buckets do, for a program per shape.
      prefix: what every instruction begins with, of a student that was trained on several tasks.
      step: of the training run, when the networks were saved.

    Raises:
      ValueError: an unknown `fit`, or settings that `sampling.edit` cannot take.
    """

    def __init__(
        self,
        made: Mapping[str, networks.Network],
        tokenizer: TextTokenizer,
        settings: Mapping[str, Any],
        *,
        buckets: Sequence[Sequence[int]] = (),
        fit: str = "bucket",
        prefix: str = "",
        step: int | None = None,
    ):
        if fit not in FITS:
            raise ValueError(f"unknown way to fit a picture {fit!r}; choose one of {FITS}")
        sampling.check(**settings)
        # The axes of training: modules that lay kernels and activations out over a mesh look for these.
        self._mesh = parallel.make_mesh(devices=jax.local_devices())
        self._by_sample = parallel.batch_sharding(self._mesh)
        self._modules = {name: made[name].module for name in NETWORKS}
        params = {name: made[name].params for name in NETWORKS}
        self._params = jax.device_put(params, parallel.replicated(self._mesh))
        self._tokenizer = tokenizer
        self._settings = dict(settings)
        self._buckets, self._fit, self._prefix = buckets, fit, prefix
        self.step = step
        self._program = jax.jit(self._edit)

    @classmethod
    def from_checkpoint(
        cls, run_directory: epath.PathLike, *, raw: bool = False, fit: str = "bucket", task: str = TASKS[0]
    ) -> "Editor":
        """Loads the editor that a training run has come to.

        Args:
          run_directory: the working directory of a run that trains a student.
          raw: the newest parameters as trained instead of their average.
          fit: how pictures are fitted, see the class.
          task: one of TASKS; where the run tells its tasks apart by prefixes, instructions get that of this one.

        Raises:
          WorkdirError: the directory is no run of an editor, has not trained the task, or has no checkpoint yet.
          FileNotFoundError, ValueError: the weights of a frozen network are missing or do not fit.
        """
        read_config(run_directory)
        with workdirs.reading(run_directory) as config:
            prefixes = export.task_prefixes(config)
            if prefixes and task not in prefixes:
                raise workdirs.WorkdirError(f"{run_directory} was trained for {list(prefixes)}, not for {task}")
            step, made = export.newest_networks(run_directory, raw=raw)
            frozen = [name for name in NETWORKS if name not in made]
            made |= {name: networks.create(config.networks[name], rng=None) for name in frozen}
            made = {name: networks.on_this_machine(network) for name, network in made.items()}
            tokenizer = TextTokenizer(networks.resolve(config.data.text_tokenizer), config.data.text_length)
            buckets = config.data.buckets if "buckets" in config.data else ()
            settings = config.sampling.to_dict()
            return cls(made, tokenizer, settings, buckets=buckets, fit=fit, prefix=prefixes.get(task, ""), step=step)

    def check(self, instruction: str, seed: int = 0) -> None:
        """Checks one request without computing anything.

        Raises:
          ValueError: an instruction with unknown words or too many of them, or a seed out of range.
        """
        self._tokenize([instruction])
        _check_seeds([seed])

    def size(self, width: int, height: int) -> pictures.Size:
        """The size (width, height) at which a picture of that size is edited."""
        if self._buckets and self._fit == "bucket":
            (chosen,) = buckets_lib.choose([height], [width], self._buckets)
            return tuple(self._buckets[chosen])[::-1]
        multiple, largest = self._limits()
        area = max((rows * columns for rows, columns in self._buckets), default=None)
        return pictures.nearest_multiple((width, height), multiple, largest, area)

    def fit(self, image: Image.Image) -> np.ndarray:
        """A picture as the networks take it: uint8 [H, W, 3], upright and at `size`."""
        image = pictures.upright(image)
        return np.asarray(pictures.resize(image, self.size(*image.size)))

    def __call__(
        self, image: Image.Image, instruction: str, seed: int = 0, *, original_size: bool = False
    ) -> Image.Image:
        """Edits one picture; raises ValueError as `check` does.

        Args:
          original_size: bring the edit back to the picture's own size, instead of leaving it at that of the networks.
        """
        edited = Image.fromarray(self.edit_batch(self.fit(image)[None], [instruction], [seed])[0])
        return pictures.resize(edited, pictures.upright(image).size) if original_size else edited

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
          batch_size: how many go through the networks at a time, the last ones filled up to it; by default all. A
            number that the devices do not divide is raised to one that they do.

        Returns:
          uint8 [B, H, W, 3].

        Raises:
          ValueError: as `check`, a size that the networks cannot take, or arguments of other shapes and lengths.
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
        devices = self._by_sample.num_devices
        size = -(-(batch_size or count) // devices) * devices
        edited = np.empty_like(images)
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch = jax.device_put([x[rows] for x in inputs], self._by_sample)
            with jax.set_mesh(self._mesh):
                edited[rows] = self._program(self._params, *batch)
        return edited

    def _edit(
        self, params: Mapping[str, Any], images: jax.Array, ids: jax.Array, mask: jax.Array, seeds: jax.Array
    ) -> jax.Array:
        """Pixels to pixels, uint8 [B, H, W, 3]; this is what is compiled."""
        _, reference = sampling.encode_image(self._modules, params, images)
        text = sampling.encode_text(self._modules, params, ids, mask)
        rngs = jax.vmap(jax.random.key)(seeds)
        latents = sampling.edit(self._modules["student"], params["student"], reference, text, rngs, **self._settings)
        return to_uint8(sampling.decode(self._modules, params, latents))

    def _limits(self) -> tuple[int, pictures.Size]:
        """What the sides must be multiples of, and the largest (width, height)."""
        student = self._modules["student"]
        multiple = self._modules["autoencoder"].downscale * student.patch_size
        _, rows, columns = student.rope_lengths
        return multiple, (columns * multiple, rows * multiple)

    def _check_size(self, width: int, height: int) -> None:
        multiple, largest = self._limits()
        fits = 0 < width <= largest[0] and 0 < height <= largest[1]
        if not fits or width % multiple or height % multiple:
            raise ValueError(
                f"the image is {width}x{height} pixels (width x height); this editor takes sides that are multiples of "
                f"{multiple}, at most {largest[0]}x{largest[1]}; resize or crop it"
            )

    def _tokenize(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, each [B, L]."""
        if not all(instruction.strip() for instruction in instructions):
            raise ValueError("an instruction is empty; say what to do")
        tokens = self._tokenizer([self._prefix + instruction for instruction in instructions])
        if tokens.cut.any():
            text = instructions[int(tokens.cut.argmax())]
            raise ValueError(
                f"the instruction {text!r} is longer than {self._tokenizer.length} tokens with the prompt around it; "
                "shorten it"
            )
        return tokens.ids, tokens.mask


def read_config(run_directory: epath.PathLike) -> ml_collections.ConfigDict:
    """The config of a run of an editor; raises WorkdirError where the directory, or its config.json, is none."""
    config = workdirs.read_config(run_directory)
    parts = [config.get(name) for name in ("networks", "optimizer", "sampling", "data")]
    if not all(isinstance(part, ml_collections.ConfigDict) for part in parts):
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
