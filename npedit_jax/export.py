"""Takes trained networks out of a run: `python -m npedit_jax.export --checkpoint RUN --output DIR --format diffusers`.

diffusers: every trained network of the run goes to a folder of its own, in the Hugging Face layout of its original
class; with --frozen the editor's other networks too, so that `npedit_jax/pytorch/edit.py` needs nothing else.
npedit: the student becomes `student.safetensors`, the state dict that the PyTorch release of NP-Edit loads with
strict=True; with --pt also the `student.pt` that its script opens.
peft: the student's adapters of a run with LoRA, as PEFT keeps them; the other formats merge them into the weights.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from npedit_jax import atomic, commands, weights
from npedit_jax.data import questions
from npedit_jax.data.batches import arrays
from npedit_jax.models.autoencoder import Autoencoder
from npedit_jax.pixels import to_pixels
from npedit_jax.training import datasets, networks, stages, workdirs
from npedit_jax.training.checkpoint import Checkpoints
from npedit_jax.weights import adapters, release
from npedit_jax.weights.saving import MAX_SHARD_BYTES, copy_tokenizer

# The folder that each network has in a diffusers pipeline.
FOLDERS = {
    "autoencoder": "vae",
    "denoiser": "transformer",
    "student": "transformer",
    "text_encoder": "text_encoder",
    "scorer": "scorer",
}


def trained_networks(run: epath.PathLike, *, raw: bool = False) -> dict[str, networks.Network]:
    """The averaged networks of a run's newest checkpoint, by name; see `newest_networks`."""
    return newest_networks(run, raw=raw)[1]


def newest_networks(run: epath.PathLike, *, raw: bool = False) -> tuple[int, dict[str, networks.Network]]:
    """The step of a run's newest whole checkpoint, and its averaged networks, by name.

    Adapters are merged into the weights that they lie on.

    Args:
      raw: the parameters as trained instead.

    Raises:
      WorkdirError: the directory is no run, or has no checkpoint yet.
      RunFault: none of its checkpoints can be read.
    """
    config = workdirs.read_config(run)
    step, found = _newest(run, raw)
    params = stages.whole(config, {name: item.params for name, item in found.items()})
    return step, {name: networks.Network(item.module, params[name]) for name, item in found.items()}


def _newest(run: epath.PathLike, raw: bool) -> tuple[int, dict[str, networks.Network]]:
    """As `newest_networks`, with adapters left as they are."""
    config = workdirs.read_config(run)
    checkpoints = Checkpoints(run, every=1, keep=1, read_only=True)
    part = "params" if raw else "ema"
    made = stages.abstract_networks(config, [name for name in config.optimizer if name in FOLDERS])
    like = {part: {name: item.params for name, item in made.items()}}
    found = checkpoints.newest(lambda step: checkpoints.restore_part(step, like)[part])
    checkpoints.close()
    if found is None:
        raise workdirs.WorkdirError(f"{run} has no checkpoint yet; let the run reach its first one")
    return found[0], {name: networks.Network(item.module, found[1][name]) for name, item in made.items()}


def export(
    run: epath.PathLike,
    output: epath.PathLike,
    *,
    raw: bool = False,
    dtype: str | None = None,
    frozen: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Writes every trained network of the run under `output` and returns what was written.

    Beside the networks of an editor goes `editor.json`: the settings with which it edits.

    Args:
      raw: the parameters as trained instead of their average.
      dtype: to convert parameters to; None keeps theirs.
      frozen: also the autoencoder and the text encoder of an editor that does not train them.
      max_shard_bytes: of tensor data in one file.

    Raises:
      WorkdirError: as `trained_networks`.
      FileExistsError: a folder to write to has content.
    """
    config = workdirs.read_config(run)
    made = trained_networks(run, raw=raw)
    if frozen:
        others = [name for name in ("autoencoder", "text_encoder") if name in config.networks and name not in made]
        made |= {name: networks.create(config.networks[name], rng=None, as_stored=True) for name in others}
    written = []
    for name, (module, params) in made.items():
        if name == "autoencoder" and name in config.optimizer:
            module = normalised(module, params, training_images(config))
        folder = epath.Path(output) / FOLDERS[name]
        weights.save(config.networks[name].kind, module, params, folder, max_shard_bytes, dtype)
        tokenizer = {"text_encoder": "text_tokenizer", "scorer": "scorer_tokenizer"}.get(name)
        if tokenizer:
            copy_tokenizer(networks.resolve(config.data[tokenizer]), folder)
        written.append(str(folder))
    if "student" in made:
        written.append(str(_write_settings(config, epath.Path(output))))
    return written


def export_release(
    run: epath.PathLike, output: epath.PathLike, *, raw: bool = False, dtype: str | None = None, pickle: bool = False
) -> list[str]:
    """Writes the student as the state dict of the PyTorch release under `output` and returns the files written.

    Args:
      pickle: also as `student.pt`, which takes PyTorch and the whole state dict in memory.

    Raises:
      WorkdirError: as `trained_networks`, or the run trains no student.
      FileExistsError: a file is there already.
      ValueError: the student has options that the release does not know.
    """
    if "student" not in workdirs.read_config(run).optimizer:
        raise workdirs.WorkdirError(f"{run} trains no student; give the --workdir of a run of stage npedit or warmup")
    student = trained_networks(run, raw=raw)["student"]
    file = epath.Path(output) / "student.safetensors"
    release.save_release(student.module, student.params, file, dtype)
    if not pickle:
        return [str(file)]
    release.pickle_release(file, file.with_suffix(".pt"))
    return [str(file), str(file.with_suffix(".pt"))]


def export_adapter(
    run: epath.PathLike, output: epath.PathLike, *, raw: bool = False, dtype: str | None = None
) -> list[str]:
    """Writes the student's adapters as a PEFT directory and returns it; another run can start from it.

    Raises:
      WorkdirError: as `trained_networks`, or the run trains no adapters of a student.
      FileExistsError: the directory has content.
    """
    config = workdirs.read_config(run)
    if "student" not in stages.adapted(config):
        raise workdirs.WorkdirError(f"{run} trains no adapters of a student; give a run with LoRA or another --format")
    spec, student = config.networks.student, _newest(run, raw)[1]["student"]
    options = dict(alpha=config.lora.alpha, base=spec.directory, dtype=dtype or "float32")
    adapters.save(output, spec.kind, student.module, student.params, **options)
    return [str(epath.Path(output))]


def task_prefixes(config: ml_collections.ConfigDict) -> dict[str, str]:
    """What instructions begin with for each task of a run that has learned several; empty for any other run."""
    told = config.data.get("task_prefix")
    return {name: questions.TASK_PREFIXES[name] if told else "" for name in config.data.get("tasks", ())}


def _write_settings(config: ml_collections.ConfigDict, output: epath.Path) -> epath.Path:
    settings = config.sampling.to_dict() | {"text_length": config.data.text_length}
    if prefixes := task_prefixes(config):
        settings["prefixes"] = prefixes
    file = output / "editor.json"
    atomic.write_text(file, json.dumps(settings, indent=2) + "\n")
    return file


def training_images(config: ml_collections.ConfigDict, count: int = 512) -> Iterator[np.ndarray]:
    """Batches of the first images, at least `count`, of a run of stage autoencoder, each uint8 [B, H, W, 3]."""
    config = config.copy_and_resolve_references()
    # The devices here need not be those of the run.
    config.mesh, config.batch_size = dict(data=-1, fsdp=1, tensor=1), 8 * jax.device_count()
    dataset = datasets.build(config, {})
    return (arrays(dataset[number])["image"] for number in range(-(-count // config.batch_size)))


def normalised(module: Autoencoder, params: Any, images: Iterable[np.ndarray]) -> Autoencoder:
    """The autoencoder with the shift and scale that give the latents of the images mean 0 and deviation 1."""
    encode = jax.jit(lambda x: module.apply({"params": params}, to_pixels(x), method="encode_moments")[0])
    means = np.concatenate([np.ravel(encode(batch)) for batch in images])
    shift, scale = float(means.mean()), 1.0 / float(means.std())
    return module.clone(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and one line where it cannot export."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.export", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="working directory of a training run")
    parser.add_argument("--output", required=True, help="directory to write into; what goes there must not exist")
    parser.add_argument("--format", choices=["diffusers", "npedit", "peft"], default="diffusers")
    parser.add_argument("--raw", action="store_true", help="the parameters as trained instead of their average")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=None)
    parser.add_argument("--frozen", action="store_true", help="diffusers: the frozen networks of an editor too")
    parser.add_argument("--pt", action="store_true", help="npedit: a .pt file too, as the release's script opens")
    arguments = parser.parse_args(argv)
    if arguments.frozen and arguments.format != "diffusers":
        parser.error("--frozen goes with --format diffusers; the release has its own autoencoder and text encoder")
    if arguments.pt and arguments.format != "npedit":
        parser.error("--pt goes with --format npedit; diffusers reads safetensors")
    if arguments.pt and importlib.util.find_spec("torch") is None:
        sys.exit("export: --pt needs PyTorch, which is not installed; pip install 'npedit_jax[torch]'")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a checkpoint opened to be read is read-only
    chosen = {"raw": arguments.raw, "dtype": arguments.dtype}
    with commands.told("export"), workdirs.reading(arguments.checkpoint):
        if arguments.format == "peft":
            written = export_adapter(arguments.checkpoint, arguments.output, **chosen)
        elif arguments.format == "npedit":
            written = export_release(arguments.checkpoint, arguments.output, pickle=arguments.pt, **chosen)
        else:
            written = export(arguments.checkpoint, arguments.output, frozen=arguments.frozen, **chosen)
    print("\n".join(written))


if __name__ == "__main__":
    main()
