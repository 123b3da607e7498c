"""Edits a picture with an exported editor, in PyTorch alone.

    python edit.py --editor EXPORTED --image in.png --instruction "make the circle red" --output out.png

EXPORTED is what `npedit_jax.export --format diffusers` wrote. This file needs torch, diffusers (0.37 or newer),
transformers and Pillow, and nothing of npedit_jax: it may be copied and run anywhere.

One picture at a time. Shapes: C channels, H and W latent height and width, K sampler steps, L text tokens, D width, S
tokens of the whole sequence.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image, ImageOps

PAD, CHAT_START = "<|endoftext|>", "<|im_start|>"
# Around the instruction. Chat: Qwen3's template with the generation prompt and no thinking. Plain: an end token.
CHAT_PROMPT = (f"{CHAT_START}user\n", f"<|im_end|>\n{CHAT_START}assistant\n<think>\n\n</think>\n\n")
PLAIN_PROMPT = ("", PAD)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow reads others by running programs
SINUSOID_PERIOD = 10000.0
SMALLEST_DIVISOR = 0.05  # below this time a predicted sample is read as a damped velocity


@dataclasses.dataclass(frozen=True)
class Options:
    """What the weights were trained with that diffusers has no setting for: "npedit" in the transformer's config.json.

    The defaults are Z-Image's. `npedit_jax.models.denoiser.Denoiser` explains each.
    """

    pad_multiple: int = 32
    pad_tokens: str = "attend"
    prediction: str = "velocity"
    position_embedding: str = "none"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the editor samples: editor.json of the export. The defaults are the release's.

    `prefixes` are what instructions begin with, by task, of an editor that has learned several.
    """

    times: Sequence[float] = (1.0, 0.9474, 0.8571, 0.6667)
    sampler: str = "ddim"
    eta: float = 1.0
    text_length: int = 512
    prefixes: dict[str, str] = dataclasses.field(default_factory=dict)


def predict_velocity(
    transformer: diffusers.ZImageTransformer2DModel,
    options: Options,
    latents: torch.Tensor,
    time: float,
    text: torch.Tensor,
    reference: torch.Tensor,
) -> torch.Tensor:
    """Velocity (noise - clean) of noisy latents [C, H, W] at a time in [0, 1], 1 being noise, given the reference.

    The sequence is the reference (frame 0, modulated as clean), the noisy latents (frame 1), pads, and the caption. The
    forward pass of the diffusers class has no such path: with several images it pads each and takes other positions.
    """
    patch, dtype = transformer.config.all_patch_size[0], transformer.dtype
    _, height, width = latents.shape
    grid = (2, height // patch, width // patch)
    tokens = grid[1] * grid[2]
    image_pads, text_pads = -2 * tokens % options.pad_multiple, -len(text) % options.pad_multiple
    positions, text_end = _positions(grid, len(text) + text_pads), len(text) + text_pads
    if options.pad_tokens == "mask":
        image_pads, text_end = 0, len(text)  # a token that nobody sees need not be there

    image = transformer.all_x_embedder[f"{patch}-1"](_patchify(torch.stack([reference, latents]), patch).to(dtype))
    if options.position_embedding == "sinusoidal":
        image = image + _sinusoids(*grid[1:], image.shape[-1]).repeat(2, 1).to(image)
    image = torch.cat([image, transformer.x_pad_token.expand(image_pads, -1)])[None]
    caption = transformer.cap_embedder(text.to(dtype))
    caption = torch.cat([caption, transformer.cap_pad_token.expand(text_end - len(text), -1)])[None]
    image_ids = torch.cat([positions[: 2 * tokens], torch.zeros(image_pads, 3, dtype=torch.int32)])
    image_turns = transformer.rope_embedder(image_ids.to(latents.device))[None]
    caption_turns = transformer.rope_embedder(positions[2 * tokens :][:text_end].to(latents.device))[None]

    # The network's own time runs from noise to clean, and its output is minus the velocity.
    own_time = torch.tensor([1.0 - time, 1.0], device=latents.device)
    noisy, clean = transformer.t_embedder(own_time * transformer.t_scale).to(dtype).split(1)
    is_noisy = (torch.arange(image.shape[1] + caption.shape[1], device=latents.device) >= tokens)[None].long()

    for block in transformer.noise_refiner:
        image = block(image, None, image_turns, None, is_noisy[:, : image.shape[1]], noisy, clean)
    for block in transformer.context_refiner:
        caption = block(caption, None, caption_turns)
    x, turns = torch.cat([image, caption], dim=1), torch.cat([image_turns, caption_turns], dim=1)
    for block in transformer.layers:
        x = block(x, None, turns, None, is_noisy, noisy, clean)
    output = transformer.all_final_layer[f"{patch}-1"](x[:, tokens : 2 * tokens], c=noisy)[0]
    output = _unpatchify(output.float(), grid[1:], patch)
    return (latents - output) / max(time, SMALLEST_DIVISOR) if options.prediction == "sample" else -output


def sample(
    velocity: Callable[[torch.Tensor, float], torch.Tensor], noises: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """Visits the times from noise to clean; `noises` [K, C, H, W] are the start and what later steps draw."""
    x = noises[0]
    for step, time in enumerate(settings.times):
        v = velocity(x, time)
        x0 = x - time * v
        if step + 1 == len(settings.times):
            return x0
        after, fresh = settings.times[step + 1], noises[step + 1]
        if settings.sampler == "fresh":
            x = (1 - after) * x0 + after * fresh
        else:  # DDIM: keeps part of the noise that the prediction implies
            kept = max(0.0, after - settings.eta * (time - after) * after / time)
            x = (1 - after) * x0 + kept * (x + (1 - time) * v) + max(0.0, after**2 - kept**2) ** 0.5 * fresh
    raise ValueError("the editor has no sampler times; see editor.json")


class Editor:
    """The networks that edit: `Editor.load(...)`, then `editor(image, instruction, seed=0)`."""

    def __init__(
        self,
        transformer: diffusers.ZImageTransformer2DModel,
        options: Options,
        autoencoder: diffusers.AutoencoderKL,
        text_encoder: transformers.Qwen3Model,
        tokenizer: tokenizers.Tokenizer,
        settings: Settings,
        prefix: str = "",
    ):
        self.prefix = prefix
        self.transformer, self.options, self.settings = transformer, options, settings
        self.autoencoder, self.text_encoder, self.tokenizer = autoencoder, text_encoder, tokenizer

    @classmethod
    def load(
        cls,
        directories: Sequence[str],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        task: str = "editing",
    ) -> "Editor":
        """Loads the networks; each comes from the first of the directories that has its folder.

        Args:
          task: "editing" or "customization", of an editor that has learned both.

        Raises:
          FileNotFoundError: a network or the tokenizer is in none of them.
          ValueError: weights, options or settings that do not fit, or a task that the editor has not learned.
        """
        options, settings = _read_options(directories), _read_settings(directories)
        if settings.prefixes and task not in settings.prefixes:
            raise ValueError(f"the editor was trained for {list(settings.prefixes)}, not for {task}; change --task")
        folder = _find(directories, "transformer/config.json").parent
        transformer, info = diffusers.ZImageTransformer2DModel.from_pretrained(folder, output_loading_info=True)
        _check_loaded(folder, info["missing_keys"], info["unexpected_keys"])
        folder = _find(directories, "vae/config.json").parent
        autoencoder, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
        _check_loaded(folder, info["missing_keys"], info["unexpected_keys"])
        text_encoder = _load_text_encoder(_find(directories, "text_encoder/config.json").parent)
        tokenizer = tokenizers.Tokenizer.from_file(
            str(_find(directories, "text_encoder/tokenizer.json", "tokenizer/tokenizer.json"))
        )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(
            transformer.to(device, dtype).eval(),
            options,
            autoencoder.to(device, torch.float32).eval(),
            text_encoder.to(device, dtype).eval(),
            tokenizer,
            settings,
            settings.prefixes.get(task, ""),
        )

    @torch.no_grad()
    def __call__(
        self, image: Image.Image, instruction: str, seed: int = 0, noise: torch.Tensor | None = None
    ) -> Image.Image:
        """Edits one picture.

        Args:
          seed: of the noise, where none is given.
          noise: standard normal [K, C, H, W], one for each sampler step.

        Raises:
          ValueError: the picture's size, the instruction or the noise's shape do not fit.
        """
        pixels = torch.from_numpy(np.array(_upright(image))).permute(2, 0, 1)
        self._check_size(pixels.shape[2], pixels.shape[1])
        text = self._encode_text(instruction)
        config, device = self.autoencoder.config, self.autoencoder.device
        shift = config.shift_factor or 0.0
        mean = self.autoencoder.encode(pixels.to(device)[None] / 127.5 - 1.0).latent_dist.mode()[0]
        reference = (mean - shift) * config.scaling_factor
        shape = (len(self.settings.times), *reference.shape)
        if noise is None:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if noise.shape != shape:
            raise ValueError(f"expected noise of shape {list(shape)}, found {list(noise.shape)}")

        def velocity(x: torch.Tensor, time: float) -> torch.Tensor:
            return predict_velocity(self.transformer, self.options, x, time, text, reference)

        latents = sample(velocity, noise.to(reference), self.settings)
        decoded = self.autoencoder.decode(latents[None] / config.scaling_factor + shift).sample[0]
        edited = ((decoded.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        return Image.fromarray(edited.permute(1, 2, 0).cpu().numpy())

    def _encode_text(self, instruction: str) -> torch.Tensor:
        """Second-to-last hidden states of the prompt, [L, D]."""
        chat = self.tokenizer.token_to_id(CHAT_START) is not None
        before, after = CHAT_PROMPT if chat else PLAIN_PROMPT
        encoding = self.tokenizer.encode(before + self.prefix + instruction + after, add_special_tokens=False)
        if "<unk>" in encoding.tokens:
            raise ValueError(f"the instruction {instruction!r} has words that this editor does not know")
        if len(encoding.ids) > self.settings.text_length:
            raise ValueError(
                f"the instruction {instruction!r} is longer than {self.settings.text_length} tokens with the prompt "
                "around it; shorten it"
            )
        ids = torch.tensor([encoding.ids], device=self.text_encoder.device)
        return self.text_encoder(ids).last_hidden_state[0]

    def _check_size(self, width: int, height: int) -> None:
        config = self.transformer.config
        multiple = 2 ** (len(self.autoencoder.config.block_out_channels) - 1) * config.all_patch_size[0]
        rows, columns = config.axes_lens[1] * multiple, config.axes_lens[2] * multiple
        if width % multiple or height % multiple or not 0 < width <= columns or not 0 < height <= rows:
            raise ValueError(
                f"the image is {width}x{height} pixels (width x height); this editor takes sides that are multiples of "
                f"{multiple}, at most {columns}x{rows}; resize or crop it"
            )


def _upright(image: Image.Image) -> Image.Image:
    """In RGB, turned as its EXIF orientation says; 16 bits become 8, and what is see-through lies on white.

    As `npedit_jax.pictures.upright` does.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        grey = np.rint(np.asarray(image, np.float32) / 257).clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _patchify(frames: torch.Tensor, size: int) -> torch.Tensor:
    """[2, C, H, W] to [2 * H / size * W / size, size * size * C], channel fastest."""
    x = frames.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2)


def _unpatchify(tokens: torch.Tensor, grid: tuple[int, int], size: int) -> torch.Tensor:
    """The inverse for one frame: [rows * columns, size * size * C] to [C, H, W]."""
    x = tokens.reshape(*grid, size, size, -1).permute(4, 0, 2, 1, 3)
    return x.flatten(3).flatten(1, 2)


def _positions(grid: tuple[int, int, int], text_length: int) -> torch.Tensor:
    """(frame, row, column) of the image tokens and then of the caption, int32 [S, 3].

    The caption counts up on the frame axis from 1, pads included; the frames come right after it.
    """
    image = torch.cartesian_prod(*(torch.arange(n, dtype=torch.int32) for n in grid))
    image[:, 0] += text_length + 1
    caption = torch.zeros(text_length, 3, dtype=torch.int32)
    caption[:, 0] = torch.arange(1, text_length + 1)
    return torch.cat([image, caption])


def _sinusoids(rows: int, columns: int, width: int) -> torch.Tensor:
    """Fixed 2-D positions [rows * columns, width], a quarter each: sin, cos of the row, sin, cos of the column."""
    frequency = SINUSOID_PERIOD ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    angles = [place[:, axis, None] * frequency for axis in (0, 1)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1).float()


def _load_text_encoder(folder: pathlib.Path) -> transformers.Qwen3Model:
    """Qwen3 without its last layer and final norm, which are not used and which an export leaves out."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers -= 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model, info = transformers.Qwen3Model.from_pretrained(folder, config=config, output_loading_info=True)
    _check_loaded(folder, set(info["missing_keys"]) - {"norm.weight"}, [])
    model.norm = torch.nn.Identity()
    return model


def _check_loaded(folder: pathlib.Path, missing: Any, unexpected: Any) -> None:
    if missing or unexpected:
        raise ValueError(f"{folder} lacks the tensors {sorted(missing)}, and nothing takes {sorted(unexpected)}")


def _find(directories: Sequence[str], *names: str) -> pathlib.Path:
    for directory in directories:
        for name in names:
            if (pathlib.Path(directory) / name).is_file():
                return pathlib.Path(directory) / name
    raise FileNotFoundError(
        f"no {' or '.join(names)} in {' or '.join(map(str, directories))}; export with --frozen, or give the base "
        "model's directory with --base"
    )


def _read_options(directories: Sequence[str]) -> Options:
    file = _find(directories, "transformer/config.json")
    return _parse(Options, json.loads(file.read_text()).get("npedit", {}), file)


def _read_settings(directories: Sequence[str]) -> Settings:
    files = [pathlib.Path(directory) / "editor.json" for directory in directories]
    file = next((file for file in files if file.is_file()), None)
    settings = _parse(Settings, json.loads(file.read_text()), file) if file else Settings()
    if settings.sampler not in ("ddim", "fresh"):
        raise ValueError(f"{file}: unknown sampler {settings.sampler!r}; known are 'ddim' and 'fresh'")
    return settings


def _parse(cls: type, values: dict[str, Any], file: pathlib.Path) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{file}: unknown {cls.__name__.lower()} {unknown}; known are {known}: take a newer edit.py")
    return cls(**values)


def _read_noise(file: str) -> torch.Tensor:
    """NumPy's [K, H, W, C], as npedit_jax draws it, to [K, C, H, W]."""
    noise = np.load(file, allow_pickle=False)
    if noise.ndim != 4:
        raise ValueError(f"{file}: expected noise [steps, height, width, channels], found shape {list(noise.shape)}")
    return torch.from_numpy(noise.astype(np.float32)).permute(0, 3, 1, 2)


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and one line where it cannot edit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--editor", required=True, help="directory that npedit_jax.export --format diffusers wrote")
    parser.add_argument("--base", help="directory of the base model, for networks that the export left out")
    parser.add_argument("--image", required=True, help="picture to edit")
    parser.add_argument("--instruction", required=True, help="what to do, such as 'make the circle red'")
    parser.add_argument("--output", required=True, help="picture to write")
    parser.add_argument("--task", default="editing", help="of an editor that has learned several; or customization")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; other seeds give other pictures")
    parser.add_argument(
        "--noise", metavar="FILE.npy", help="float32 [steps, height, width, channels] instead of a seed"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16, float32 on a CPU")
    arguments = parser.parse_args(argv)
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    # Both libraries warn about the options and the layer that are taken care of here.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with Image.open(arguments.image, formats=FORMATS) as file:
            image = file.copy()
        noise = _read_noise(arguments.noise) if arguments.noise else None
        directories = [arguments.editor, *([arguments.base] if arguments.base else [])]
        editor = Editor.load(directories, arguments.device, getattr(torch, dtype), arguments.task)
        editor(image, arguments.instruction, arguments.seed, noise).save(arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"edit: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
