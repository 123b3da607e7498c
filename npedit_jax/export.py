"""Takes trained networks out of a run: `python -m npedit_jax.export --checkpoint RUN --output DIR --format diffusers`.

Every trained network of the run goes to a folder of its own, in the Hugging Face layout of its original class.
"""

import argparse
import sys
from typing import Any

import jax
import numpy as np
from etils import epath

from npedit_jax import weights
from npedit_jax.data import easyvqa
from npedit_jax.models.autoencoder import Autoencoder
from npedit_jax.pixels import to_pixels
from npedit_jax.training import networks, workdirs
from npedit_jax.training.checkpoint import Checkpoints

# The folder that each network has in a diffusers pipeline.
FOLDERS = {
    "autoencoder": "vae",
    "denoiser": "transformer",
    "student": "transformer",
    "text_encoder": "text_encoder",
    "scorer": "scorer",
}


def trained_networks(run: epath.PathLike, *, raw: bool = False) -> dict[str, networks.Network]:
    """The averaged networks of a run's newest checkpoint, by name; `raw` takes the parameters as trained instead.

    Raises:
      WorkdirError: the directory is no run, or has no checkpoint yet.
    """
    config = workdirs.read_config(run)
    checkpoints = Checkpoints(run, every=1, keep=1, read_only=True)
    step = checkpoints.latest()
    if step is None:
        raise workdirs.WorkdirError(f"{run} has no checkpoint yet; let the run reach its first one")
    part = "params" if raw else "ema"
    made = {name: config.networks[name] for name in config.optimizer if name in FOLDERS}
    modules = {name: networks.module_of(spec) for name, spec in made.items()}
    shapes = {name: networks.shapes(made[name].kind, module) for name, module in modules.items()}
    params = checkpoints.restore_part(step, {part: shapes})[part]
    checkpoints.close()
    return {name: networks.Network(module, params[name]) for name, module in modules.items()}


def export(run: epath.PathLike, output: epath.PathLike, *, raw: bool, dtype: str | None) -> list[str]:
    """Writes every trained network of the run under `output` and returns the folders written."""
    config = workdirs.read_config(run)
    written = []
    for name, (module, params) in trained_networks(run, raw=raw).items():
        if name == "autoencoder":
            module = normalised(module, params)
        folder = epath.Path(output) / FOLDERS[name]
        weights.save(config.networks[name].kind, module, params, folder, dtype=dtype)
        tokenizer = {"text_encoder": "text_tokenizer", "scorer": "scorer_tokenizer"}.get(name)
        if tokenizer:
            (networks.resolve(config.data[tokenizer]) / "tokenizer.json").copy(folder / "tokenizer.json")
        written.append(str(folder))
    return written


def normalised(module: Autoencoder, params: Any, images: int = 512, batch: int = 64) -> Autoencoder:
    """The autoencoder with the shift and scale that give the latents of training images mean 0 and deviation 1."""
    encode = jax.jit(lambda x: module.apply({"params": params}, to_pixels(x), method="encode_moments")[0])
    pictures = easyvqa.load("train").images[:images]
    means = np.concatenate([encode(pictures[start : start + batch]) for start in range(0, images, batch)])
    shift, scale = float(means.mean()), 1.0 / float(means.std())
    return module.clone(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.export", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="working directory of a training run")
    parser.add_argument("--output", required=True, help="directory to write into; its folders must not exist")
    parser.add_argument("--format", choices=["diffusers"], default="diffusers")
    parser.add_argument("--raw", action="store_true", help="the parameters as trained instead of their average")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=None)
    arguments = parser.parse_args()
    try:
        for folder in export(arguments.checkpoint, arguments.output, raw=arguments.raw, dtype=arguments.dtype):
            print(folder)
    except (workdirs.WorkdirError, FileExistsError) as error:
        sys.exit(f"export: {error}")


if __name__ == "__main__":
    main()
