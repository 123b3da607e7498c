"""Networks of a few hundred parameters for the edit stage, and batches that fit them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from npedit_jax import weights
from npedit_jax.training import networks
from tests.training.tiny import AUTOENCODER, LOG, READING, RUN

ADAPTED = ("layers/*",)  # layers of the denoiser with adapters in `lora_config`
BATCH, INNER, TEXT, QUESTION = 2, 3, 4, 12
DENOISER = dict(
    in_channels=2,
    dim=8,
    n_layers=1,
    n_refiner_layers=1,
    n_heads=1,
    cap_feat_dim=8,
    axes_dims=(4, 2, 2),
    axes_lens=(64, 8, 8),
    npedit=dict(pad_multiple=4),
)
LANGUAGE = dict(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=8,
    num_attention_heads=1,
    num_key_value_heads=1,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
    hidden_act="silu",
)
SPECS = {
    "autoencoder": (
        "autoencoder",
        AUTOENCODER,
    ),
    "text_encoder": ("qwen3", LANGUAGE | dict(model_type="qwen3", num_hidden_layers=2, head_dim=8)),
    "scorer": (
        "internvl",
        dict(
            model_type="internvl_chat",
            downsample_ratio=0.5,
            ps_version="v2",
            select_layer=-1,
            vision_config=dict(
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=8,
                patch_size=4,
                image_size=8,
                layer_norm_eps=1e-6,
                norm_type="layer_norm",
                hidden_act="gelu",
                qkv_bias=True,
                qk_normalization=False,
            ),
            llm_config=LANGUAGE | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_hidden_layers=1),
            npedit=dict(answer_ids=(1, 2)),
        ),
    ),
    "student": ("zimage", DENOISER),
    "real_score": ("zimage", DENOISER),
    "fake_score": ("zimage", DENOISER),
}


STEP = dict(ema=0.9, skip_norm=1e9)
FLOW = dict(time_shift=1.0, weighting="uniform", endpoint=0.0)
EDITING = dict(times=(1.0, 0.5), sampler="fresh", eta=1.0)
QUESTION_TOKENS = 48  # of easy-VQA's longest question about two images of a token each


def noise(shapes: Any, rng: np.random.Generator) -> Any:
    """Parameters full of noise: a fresh network's output layer is zero and passes no gradient on."""
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


@functools.cache
def parts() -> tuple[dict, dict]:
    """Modules and their parameters."""
    modules = {name: weights.build(kind, networks.plain(config)) for name, (kind, config) in SPECS.items()}
    rng = np.random.default_rng(0)
    return modules, {name: noise(networks.shapes(SPECS[name][0], module), rng) for name, module in modules.items()}


def _mask(*shape: int, start: int = 0) -> np.ndarray:
    """True on tokens: texts of all lengths from that of the longest down to half of it, one after the other."""
    *texts, longest = shape
    lengths = longest - (start + np.arange(np.prod(texts))) % (longest // 2 + 1)
    return np.arange(longest) < lengths.reshape(*texts, 1)


def batches() -> dict[str, jax.Array]:
    """Texts and questions of different lengths, padded."""
    rng = np.random.default_rng(1)
    shape = (INNER, BATCH)
    ids = lambda *s: rng.integers(3, 11, s).astype(np.int32)  # noqa: E731
    index = np.broadcast_to(np.r_[0, 1, np.full(QUESTION - 2, -1)], (*shape, 2, QUESTION))
    return {
        "reference": rng.integers(0, 256, (*shape, 8, 8, 3)).astype(np.uint8),
        "instruction_ids": ids(*shape, TEXT),
        "instruction_mask": _mask(*shape, TEXT),
        "caption_ids": ids(*shape, TEXT),
        "caption_mask": _mask(*shape, TEXT, start=1),
        "negative_ids": ids(INNER, 1, TEXT),
        "negative_mask": _mask(INNER, 1, TEXT, start=1),
        "question_ids": ids(*shape, 2, QUESTION),
        "question_mask": _mask(*shape, 2, QUESTION),
        "image_index": index.astype(np.int32),
        "answer": np.ones((*shape, 2), np.int32),
        "question_weight": np.ones((*shape, 2), np.float32),
        "guidance": np.full(shape, 2.0, np.float32),
        "dmd_weight": np.ones(shape, np.float32),
        "identity_weight": np.zeros(shape, np.float32),
        "weight": np.ones(shape, np.float32),
    }


def warmup_config(data: Mapping[str, Any], *, vocabulary: int, places: int, base: bool = False, **fields) -> ConfigDict:
    """A run of the warm-up with tiny networks.

    Args:
      data: of the config.
      vocabulary: of the text encoder.
      places: on the first axis of the denoiser's positions.
      base: whether a denoiser "base" stays frozen beside the student.
      fields: the rest of the config.
    """
    denoisers = ("base", "student") if base else ("student",)
    specs = _specs(vocabulary, places, denoisers)
    return _config("warmup", specs, ("student",), data=data, step=STEP | FLOW, sampling=EDITING, **fields)


def _specs(vocabulary: int, places: int, denoisers: Sequence[str]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Kind and architecture of the autoencoder, the text encoder and denoisers of those names."""
    kind, language = SPECS["text_encoder"]
    specs = {"autoencoder": SPECS["autoencoder"], "text_encoder": (kind, language | dict(vocab_size=vocabulary))}
    return specs | dict.fromkeys(denoisers, ("zimage", DENOISER | dict(axes_lens=(places, 32, 32))))


def _config(stage: str, specs: Mapping[str, tuple], trained: Sequence[str], **fields) -> ConfigDict:
    adam = dict(name="adam", learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=0, b1=0.9, b2=0.99)
    return ConfigDict(
        dict(
            stage=stage,
            seed=0,
            cpu_devices=1,
            networks={
                name: dict(kind=kind, directory="", architecture=networks.plain(architecture), options={})
                for name, (kind, architecture) in specs.items()
            },
            optimizer=dict.fromkeys(trained, adam),
        )
        | RUN
        | fields
    )


def easyvqa_config(stage: str, **fields) -> ConfigDict:
    """A step of "base", "scorer" or "supervised", or four of "npedit", on easy-VQA's images with tiny networks.

    Args:
      fields: of the config, in the place of those given here.
    """
    denoisers, trained = {
        "base": (("denoiser",), ("denoiser", "text_encoder")),
        "scorer": ((), ("scorer",)),
        "supervised": (("student",), ("student",)),
        "npedit": (("student", "real_score", "fake_score"), ("student", "fake_score")),
    }[stage]
    specs, data = _specs(64, 64, denoisers), dict(reading=READING)
    if stage == "scorer":
        specs.pop("text_encoder")
    else:
        data |= dict(text_tokenizer="package:pretrained/easyvqa/text_encoder", text_length=16)
    if stage in ("scorer", "npedit"):
        kind, scorer = SPECS["scorer"]
        language = scorer["llm_config"] | dict(vocab_size=72)
        specs["scorer"] = (kind, scorer | dict(llm_config=language, npedit=dict(answer_ids=(7, 8))))
        data |= dict(
            scorer_tokenizer="package:pretrained/easyvqa/scorer", question_length=QUESTION_TOKENS, templates="easyvqa"
        )
    shares = dict(recolor=0.25, remove=0.25, replace=0.25, nothing=0.25)
    options = {
        "base": dict(fraction=0.01, caption_dropout=0.1, plain_share=0.1, redraw=0.3, instruction_share=0.1),
        "scorer": dict(questions=2, packed_length=2 * QUESTION_TOKENS),
        "supervised": dict(edit_weights=shares),
        "npedit": dict(fraction=0.01, edit_weights=shares, guidance=dict.fromkeys(shares, 2.0), negative_prompt=""),
    }[stage]
    of_stage = {
        "base": dict(step=STEP | FLOW, sampling=dict(steps=2, time_shift=1.0)),
        "scorer": dict(step=STEP | dict(roundtrip=0.5, latent_noise=0.3)),
        "supervised": dict(step=STEP | FLOW, sampling=EDITING),
        "npedit": dict(
            step=STEP | dict(times=EDITING["times"], scorer_weight=0.5, max_unroll=1),
            sampling=EDITING,
            fake_updates=2,
            separate_steps=True,
        ),
    }[stage]
    length = dict(steps=4 if stage == "npedit" else 1, batch_size=2)
    length |= dict(checkpoint=dict(every=2, keep=2), log=LOG | dict(preview_every=1))
    return _config(stage, specs, trained, data=data | dict(options=options), **of_stage | length | fields)


def lora_config(**lora_settings) -> ConfigDict:
    """Two steps of the warm-up on real images, with adapters on a network that stays frozen."""
    lora = dict(rank=2, alpha=4.0, targets=ADAPTED, base=dict(student="base"), start=dict(student=""))
    data = dict(
        reading=READING,
        text_tokenizer="package:pretrained/easyvqa/text_encoder",
        text_length=16,
        options=dict(caption_dropout=0.1, fraction=0.01),
    )
    return warmup_config(
        data,
        vocabulary=64,
        places=64,
        base=True,
        steps=2,
        batch_size=2,
        lora=lora | lora_settings,
        checkpoint=dict(every=2, keep=1),
        log=LOG | dict(preview_every=2),
    )
