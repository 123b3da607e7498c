"""Time of the edit stage's two gradients on a mid-size configuration: `python benchmarks/step.py`.

The student's loss and the fake score's, forward and backward, for both lengths of the unroll: compiled, warm, float32,
batch 1, random weights. Encoding the reference, the text encoder and the optimizer are left out. Prints, per program,
seconds, the FLOPs of matrix products and convolutions that it needs, their share of the measured peak of a matrix
product, what it executes beyond them (recomputation), and the memory of its temporaries; `--parts` also times the
pieces by themselves, `--trace DIR` writes a profile.

`--size card --dtype bfloat16` is a larger one that fills a GPU, with `--implementation cudnn` for its flash kernel.
"""

import argparse
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from npedit_jax import chips, flops, weights
from npedit_jax.training import edit_losses, networks
from npedit_jax.training.edit_losses import Conditions, EditSettings, LossDraws, StudentDraws
from npedit_jax.weights import published

LATENTS, PIXELS = (1, 64, 64, 16), (1, 512, 512, 3)
TEXT_WIDTH = 256
# Tokens and padded length. The negative text of 40, for which 64 would do, shares its batch with the caption.
TEXTS = {"instruction": (90, 96), "caption": (100, 128), "negative": (40, 128)}
IMAGE_TOKENS = 256
EDIT_QUESTION, IDENTITY_QUESTION = 924, 743  # tokens
SHARED = 540  # of both questions: two images and the words around them
DENOISER = dict(
    in_channels=16,
    dim=256,
    n_layers=6,
    n_refiner_layers=2,
    n_heads=8,
    cap_feat_dim=TEXT_WIDTH,
    axes_dims=[8, 12, 12],
    axes_lens=[1536, 512, 512],
)
AUTOENCODER = dict(
    block_out_channels=[16, 32, 32, 32],
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=8,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    mid_block_add_attention=True,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
SCORER = dict(
    model_type="internvl_chat",
    downsample_ratio=0.5,
    vision_config=dict(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=1024,
        patch_size=14,
        image_size=448,
        qkv_bias=True,
    ),
    llm_config=dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        vocab_size=304,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    npedit=dict(answer_ids=[1, 2]),
)
# For one card: heads as wide as those of Z-Image, its autoencoder, and InternVL3-1B with a short vocabulary.
LARGE_DENOISER = DENOISER | dict(dim=1536, n_layers=12, n_heads=12, axes_dims=[32, 48, 48])
LARGE_SCORER = published.ARCHITECTURES["InternVL3-1B"]
LARGE_SCORER = LARGE_SCORER | dict(
    llm_config=LARGE_SCORER["llm_config"] | dict(vocab_size=304), npedit=SCORER["npedit"]
)
SIZES = {
    "release": (DENOISER, AUTOENCODER, SCORER),  # the work that the release was timed on
    "card": (LARGE_DENOISER, published.AUTOENCODER, LARGE_SCORER),
}
SETTINGS = EditSettings(times=(1.0, 0.9474, 0.8571, 0.6667))
RNG = np.random.default_rng(0)


def noise(*shape: int, scale: float = 1.0) -> jax.Array:
    """Standard normal numbers, scaled."""
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


def build(size: str, dtype: Any, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Modules, and random parameters that keep activations finite.

    Args:
      size: a key of SIZES.
      dtype: of computations and parameters, but for the autoencoder's, which stay in float32.
    """
    denoiser, autoencoder, scorer = SIZES[size]
    kinds = {name: ("zimage", denoiser) for name in ("student", "fake_score", "real_score")}
    kinds |= {"autoencoder": ("autoencoder", autoencoder), "scorer": ("internvl", scorer)}
    modules = {}
    for name, (kind, config) in kinds.items():
        own = dict(dtype=dtype, param_dtype=dtype, implementation=options["implementation"])
        rest = {"remat": options["remat"]} | ({} if kind == "autoencoder" else own)
        modules[name] = weights.build(kind, config, **rest)
    shapes = {name: networks.shapes(kinds[name][0], module) for name, module in modules.items()}
    scale = lambda x: 1.0 / math.sqrt(max(1, math.prod(x.shape[-2:-1])))  # noqa: E731
    return modules, jax.tree.map(lambda x: noise(*x.shape, scale=scale(x)).astype(x.dtype), shapes)


def conditions() -> Conditions:
    """A reference image, its latents, and the hidden states of three texts."""
    texts = [(noise(1, padded, TEXT_WIDTH), jnp.arange(padded)[None] < tokens) for tokens, padded in TEXTS.values()]
    return Conditions(noise(*PIXELS, scale=0.3), noise(*LATENTS), *texts)


def questions(packed: bool) -> dict[str, jax.Array]:
    """Both questions about two images, packed into one row or in a row each."""
    lengths, images = (EDIT_QUESTION, IDENTITY_QUESTION), np.arange(2 * IMAGE_TOKENS)
    if not packed:
        places = np.arange(EDIT_QUESTION)
        index = np.where((places >= 8) & (places < 8 + images.size), places - 8, -1)
        return {
            "question_ids": jnp.full((1, 2, EDIT_QUESTION), 5),
            "question_mask": jnp.asarray([[places < length for length in lengths]]),
            "image_index": jnp.asarray([[index, index]]),
        }
    own = [length - SHARED for length in lengths]
    index = np.full(SHARED + sum(own), -1)
    index[8 : 8 + images.size] = images
    row = lambda parts: jnp.asarray(np.concatenate(parts))[None]  # noqa: E731
    return {
        "packed_ids": jnp.full((1, len(index)), 5),
        "packed_positions": row([np.arange(SHARED), *(SHARED + np.arange(count) for count in own[::-1])]),
        "packed_segments": row([np.zeros(SHARED, int), np.full(own[1], 2), np.full(own[0], 1)]),
        "packed_image_index": jnp.asarray(index)[None],
        "answer_place": jnp.asarray([[len(index) - 1, SHARED + own[1] - 1]]),
    }


def programs(modules: Mapping[str, Any], packed: bool) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """The four gradients by name, with arguments other than the parameters."""
    one = jnp.ones((1,))
    batch = questions(packed) | {"answer": jnp.ones((1, 2)), "question_weight": jnp.ones((1, 2)), "guidance": 3.5 * one}
    batch |= {"dmd_weight": one, "identity_weight": 0.0 * one, "weight": one}
    draws = (StudentDraws(noise(*LATENTS), 0.8571 * one, noise(*LATENTS)), LossDraws(0.4 * one, noise(*LATENTS), None))

    def student(params, given, batch, draws, *, two_steps):
        rest = (params, modules, batch, given, draws, jnp.asarray(500), SETTINGS)
        loss = lambda student: edit_losses.student_loss(  # noqa: E731
            {"params": student}, {"params": params["fake_score"]}, *rest, two_steps=two_steps
        )
        return jax.value_and_grad(loss, has_aux=True)(params["student"])

    def fake_score(params, given, batch, draws, *, two_steps):
        rest = ({"params": params["student"]}, modules, batch, given, draws)
        loss = lambda fake: edit_losses.fake_score_loss({"params": fake}, *rest, two_steps=two_steps)  # noqa: E731
        return jax.value_and_grad(loss)(params["fake_score"])

    return {
        f"{step.__name__}, unroll {1 + two_steps}": (
            lambda *arguments, step=step, two_steps=two_steps: step(*arguments, two_steps=two_steps),
            (conditions(), batch, draws),
        )
        for step in (student, fake_score)
        for two_steps in (False, True)
    }


def parts(modules: Mapping[str, Any], packed: bool) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Pieces of the student's gradient by themselves, forward and backward to their inputs."""
    given, batch = conditions(), questions(packed)
    t = jnp.full((1,), 0.4)

    def gradient(loss):
        return lambda params, *rest: jax.grad(lambda x: jnp.sum(jnp.square(loss(params, x))))(rest[0])

    student = lambda params, x: modules["student"].apply(  # noqa: E731
        {"params": params["student"]}, x, t, *given.instruction, given.reference
    )
    weights_too = lambda params, x: jax.grad(  # noqa: E731
        lambda p, x: jnp.sum(jnp.square(student({"student": p}, x))), argnums=(0, 1)
    )(params["student"], x)
    score = lambda params, x: modules["real_score"].apply(  # noqa: E731
        {"params": params["real_score"]}, x, t, *given.caption
    )
    decode = lambda params, x: modules["autoencoder"].apply(  # noqa: E731
        {"params": params["autoencoder"]}, x, method="decode"
    )
    ask = lambda params, x: edit_losses.answers(modules, params["scorer"], given.pixels, x, batch).logits  # noqa: E731
    latents, pixels = (noise(*LATENTS),), (noise(*PIXELS, scale=0.3),)
    return {
        "student forward": (student, latents),
        "student forward, backward": (weights_too, latents),
        "score forward": (score, latents),
        "decode forward, backward": (gradient(decode), latents),
        "scorer forward, backward": (gradient(ask), pixels),
    }


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a warm call."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak(dtype: Any, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a large matrix product here."""
    a = noise(size, size).astype(dtype)
    product = jax.jit(lambda a: a @ a)
    return 2.0 * size**3 / seconds(lambda: product(a), repeats)


def measure(name: str, run: Callable[..., Any], work: float, call: tuple, repeats: int, best: float) -> None:
    """Compiles, times and prints one program that needs so many FLOPs."""
    params, *arguments = call
    executed = flops.useful(run, params, *arguments)
    start = time.perf_counter()
    compiled = jax.jit(run).lower(params, *arguments).compile()
    compile_time = time.perf_counter() - start
    spent = seconds(lambda: compiled(params, *arguments), repeats)
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    share, more = work / spent / best, executed / work - 1.0
    print(
        f"{name:27s} {spent:7.3f} s {work / 1e9:8.1f} GFLOP {work / spent / 1e9:7.1f} GFLOP/s {share:6.1%} of peak "
        f"{more:+6.1%} executed {memory:7.0f} MiB temporaries, compiled in {compile_time:.0f} s",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per program")
    parser.add_argument("--remat", default="none", help="remat policy of all networks")
    parser.add_argument("--implementation", default="xla", help="of attention")
    parser.add_argument("--size", default="release", choices=SIZES, help="of the networks")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of all but the autoencoder"
    )
    parser.add_argument("--unpacked", action="store_true", help="a row for each question")
    parser.add_argument("--parts", action="store_true", help="also the pieces by themselves")
    parser.add_argument("--only", default="", help="programs whose name holds this")
    parser.add_argument("--trace", help="directory for a jax.profiler trace of the timed calls")
    arguments = parser.parse_args()
    device, dtype = jax.devices()[0], jnp.dtype(arguments.dtype)
    options = {"remat": arguments.remat, "implementation": arguments.implementation}
    modules, params = build(arguments.size, dtype, options)
    published_peak = chips.peak_flops(device) if dtype == jnp.bfloat16 else None
    best = published_peak or peak(dtype, 2048 if device.platform == "cpu" else 8192)
    told = "published" if published_peak else "measured"
    print(f"{device.device_kind}, {dtype}, batch 1; {told} peak of matrix products {best / 1e9:.0f} GFLOP/s")
    plain = {name: flops.plain(module) for name, module in modules.items()}
    chosen, needed = (
        programs(some, not arguments.unpacked) | (parts(some, not arguments.unpacked) if arguments.parts else {})
        for some in (modules, plain)
    )
    if arguments.trace:
        jax.profiler.start_trace(arguments.trace)
    for name, (run, rest) in chosen.items():
        if arguments.only in name:
            work = flops.useful(needed[name][0], params, *rest)
            measure(name, run, work, (params, *rest), arguments.repeats, best)
    if arguments.trace:
        jax.profiler.stop_trace()
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if on_device := (device.memory_stats() or {}).get("peak_bytes_in_use"):
        print(f"peak memory of the device {on_device / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
