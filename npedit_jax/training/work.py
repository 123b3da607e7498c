"""What a step works through, from which its speed is told: samples, tokens, FLOPs."""

import functools
from collections.abc import Mapping

import jax
import numpy as np

from npedit_jax import chips, flops, parallel
from npedit_jax.data.batches import arrays
from npedit_jax.training import stages, state, telemetry
from npedit_jax.training.stages import Config, Stage

TEXTS = ("caption_ids", "instruction_ids", "question_ids", "packed_ids")  # fields that hold each sample's own tokens


def of_step(config: Config, stage: Stage) -> telemetry.Work:
    """What a step works through. FLOPs are counted, which takes a trace, where the device's peak is known."""
    batch = arrays(stage.dataset[0])
    images = max((x for x in batch.values() if x.dtype == np.uint8), key=lambda x: x.size)
    leading, (places, of) = (2 if stage.inner_batches else 1), parallel.host_places(stage.mesh)
    hosts = of // len(places)
    samples = int(np.prod(images.shape[:leading])) * hosts
    texts = sum(int(np.prod(batch[name].shape[leading:])) for name in TEXTS if name in batch)
    patches = int(np.prod(images.shape[leading:-1])) // _patch(stage) ** 2
    peak = chips.peak_flops(stage.mesh.devices.flat[0])
    needed = hosts * _useful_flops(config, stage, batch) if peak else 0.0
    return telemetry.Work(samples, samples * (patches + texts), stage.mesh.size, needed, peak)


def _patch(stage: Stage) -> int:
    """Pixels along the side of what the first network that looks at pictures takes as a token."""
    modules = stage.modules
    denoiser = next((modules[name] for name in ("student", "denoiser") if name in modules), None)
    if denoiser is not None:
        return modules["autoencoder"].downscale * denoiser.patch_size
    return modules["scorer"].vision.patch_size if "scorer" in modules else modules["autoencoder"].downscale


def _useful_flops(config: Config, stage: Stage, batch: Mapping[str, np.ndarray]) -> float:
    """FLOPs of a step on a host's batch, on average over the unroll's length."""
    if config.stage == "npedit":  # of one program for both lengths only the longer could be counted
        config = config.copy_and_resolve_references()
        config.separate_steps = True
    functions = stages.step_functions(config, {name: flops.plain(module) for name, module in stage.modules.items()})
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    params = {name: jax.tree.map(shape, network.params) for name, network in stage.networks.items()}
    trained = {name: params.pop(name) for name in stage.rules}
    start = jax.eval_shape(functools.partial(state.create, rules=stage.rules, averaged=stage.averaged), trained)
    one = {name: x[0] if stages.separate(config) else x for name, x in batch.items()}
    arguments = (start, params, jax.tree.map(shape, one), jax.eval_shape(lambda: jax.random.key(0)))
    return sum(runs * flops.useful(functions[name], *arguments) for name, runs in stages.expected_runs(config).items())
