"""PNG grids that show what a run makes while it trains."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from npedit_jax import contact_sheet, parallel, sampling
from npedit_jax.data.batches import arrays
from npedit_jax.data.tokenize import TextTokenizer
from npedit_jax.models import lora
from npedit_jax.objectives import feedback
from npedit_jax.pixels import to_pixels, to_uint8
from npedit_jax.sampling import Modules
from npedit_jax.training import networks, stages
from npedit_jax.training.edit_losses import answers
from npedit_jax.training.state import TrainState

COLUMNS = 8


def grid(rows: list[np.ndarray], gap: int = 2) -> Image.Image:
    """Rows of uint8 images [n, H, W, 3] as one picture."""
    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


class Previews:
    """Writes `samples/step-N.png` in the working directory: for every stage what its networks make of fixed inputs."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: epath.PathLike):
        self._config = config
        self._directory = epath.Path(workdir) / "samples"
        self._program: Callable | None = None
        self._notes: Callable | None = None  # of stages whose pictures are made from texts

    def __call__(self, stage: stages.Stage, state: TrainState, frozen: dict[str, Any], step: int) -> None:
        """Draws one grid, on all processes together; the scorer's stage has no pictures."""
        if self._config.stage not in PREVIEWS:
            return
        if self._program is None:
            self._build(stage)
        params = {**frozen, **state.ema}
        made = self._program(params, self._batch, self._key)
        told = jax.device_get(self._notes(params, self._batch, made)) if self._notes else None
        if jax.process_index() != 0:
            return
        rows = [row[:COLUMNS] for row in jax.device_get(made)]
        picture = self._sheet(rows, told) if told else grid(rows)
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"step-{step:07d}.png").open("wb") as file:
            picture.save(file, format="PNG")

    def _build(self, stage: stages.Stage) -> None:
        whole = parallel.replicated(stage.mesh)
        self._batch = parallel.put_batch(first_batch(stage), stage.mesh)
        self._key = parallel.place(lambda: jax.random.key(0), whole)
        self._program = program(self._config, stage.modules, stage.adapted, stage.mesh)
        if PREVIEWS[self._config.stage] is _editor:
            self._notes = notes_program(stage.modules, stage.mesh)
            directory = networks.resolve(self._config.data.text_tokenizer)
            self._text = TextTokenizer(directory, self._config.data.text_length)

    def _sheet(self, rows: list[np.ndarray], told: Mapping[str, np.ndarray]) -> Image.Image:
        """Reference and edit side by side, under the text, with the scorer's probabilities where it was asked."""
        lines = []
        for number, pair in enumerate(zip(*rows, strict=True)):
            scores = [None, None]
            if "right" in told:
                asked = told["question_weight"][number]
                scores = [right if weight else None for right, weight in zip(told["right"][number], asked, strict=True)]
            cells = [contact_sheet.Cell(Image.fromarray(image)) for image in pair]
            cells[-1] = cells[-1]._replace(lines=contact_sheet.scores(*scores))
            lines.append((self._text.read(told["ids"][number][told["mask"][number]]), cells))
        return contact_sheet.draw(lines, abreast=2)


def notes_program(modules: Modules, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """`notes` of these modules, compiled; every process gets all of them."""
    return jax.jit(functools.partial(notes, modules), out_shardings=parallel.replicated(mesh))


def notes(
    modules: Modules, params: Mapping[str, Any], batch: Mapping[str, jax.Array], rows: Sequence[jax.Array]
) -> dict[str, jax.Array]:
    """What stands beside edits: tokens of their texts; with a scorer its probabilities of the wanted answers, [B, 2].

    Args:
      rows: references and edits, uint8 [B, H, W, 3].
    """
    kind = _text_of(batch)
    found = {"ids": batch[f"{kind}_ids"], "mask": batch[f"{kind}_mask"]}
    if "scorer" in modules:
        frozen = parallel.on_devices(params["scorer"])
        output = answers(modules, frozen, *(to_pixels(row) for row in rows), batch)
        found["right"] = feedback.right_probability(output.logits, batch["answer"])
        found["question_weight"] = batch["question_weight"]
    return found


def _text_of(batch: Mapping[str, jax.Array]) -> str:
    """What the student is told: the instruction, in the warm-up the caption."""
    return "instruction" if "instruction_ids" in batch else "caption"


def program(
    config: ml_collections.ConfigDict, modules: Modules, adapted: Mapping[str, lora.Adapted], mesh: Mesh
) -> Callable[..., tuple[jax.Array, ...]]:
    """`function`, compiled; every process gets all pictures."""
    return jax.jit(function(config, modules, adapted), out_shardings=parallel.replicated(mesh))


def function(
    config: ml_collections.ConfigDict, modules: Modules, adapted: Mapping[str, lora.Adapted]
) -> Callable[..., tuple[jax.Array, ...]]:
    """What makes a stage's pictures, as `(parameters of all networks, batch, rng) -> rows` of uint8 [B, H, W, 3].

    Of adapted networks the parameters are the adapters.
    """
    make = PREVIEWS[config.stage](modules, config)

    def rows(params, batch, rng):
        params = parallel.on_devices(params)
        drawing = {name: item for name, item in adapted.items() if name in params}  # the fake score draws nothing
        return tuple(to_uint8(row) for row in make(lora.merged(params, drawing), batch, rng))

    return rows


def first_batch(stage: stages.Stage) -> dict[str, np.ndarray]:
    """This host's first samples of the stage's data, without an axis of inner batches."""
    batch = arrays(stage.dataset[0])
    if stage.inner_batches:
        batch = {name: value[0] for name, value in batch.items()}
    # One device needs no more samples than are shown; several need a sample each.
    kept = COLUMNS if stage.mesh.size == 1 else None
    return {name: value[:kept] for name, value in batch.items()}


def _autoencoder(modules: Modules, config: ml_collections.ConfigDict) -> Callable:
    """Images, and what the autoencoder makes of them."""
    module = modules["autoencoder"]

    def rows(params, batch, rng):
        pixels = to_pixels(batch["image"])
        return pixels, module.apply({"params": params["autoencoder"]}, pixels)

    return rows


def _base(modules: Modules, config: ml_collections.ConfigDict) -> Callable:
    """Images, and what the base model draws from their captions."""
    settings = config.sampling

    def rows(params, batch, rng):
        pixels = to_pixels(batch["image"])
        text = sampling.encode_text(modules, params, batch["caption_ids"], batch["caption_mask"])
        options = dict(steps=settings.steps, time_shift=settings.time_shift)
        return pixels, sampling.draw(modules, params, pixels.shape[1:3], text, None, rng, **options)

    return rows


def _editor(modules: Modules, config: ml_collections.ConfigDict) -> Callable:
    """References, and the student's edits of them by the batch's instructions (its captions in the warm-up)."""
    settings = config.sampling

    def rows(params, batch, rng):
        pixels, latents = sampling.encode_image(modules, params, batch["reference"])
        kind = _text_of(batch)
        text = sampling.encode_text(modules, params, batch[f"{kind}_ids"], batch[f"{kind}_mask"])
        edited = sampling.edit(
            modules["student"],
            params["student"],
            latents,
            text,
            jax.random.split(rng, len(pixels)),
            times=settings.times,
            sampler=settings.sampler,
            eta=settings.eta,
        )
        return pixels, sampling.decode(modules, params, edited)

    return rows


PREVIEWS = {"autoencoder": _autoencoder, "base": _base, "warmup": _editor, "npedit": _editor, "supervised": _editor}
