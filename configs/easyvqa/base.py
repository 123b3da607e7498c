"""The small text-to-image model of the easy-VQA experiment: a Z-Image denoiser and its Qwen3 text encoder.

Laptop: python -m npedit_jax.train --config configs/easyvqa/base.py --workdir runs/easyvqa-base
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = ConfigDict()
    config.stage = "base"
    config.seed = 0
    config.steps = 16000
    config.batch_size = 16
    config.cpu_devices = 1

    config.networks = ConfigDict()
    config.networks.autoencoder = network("autoencoder", "package:pretrained/easyvqa/vae")
    config.networks.denoiser = network(
        "zimage",
        architecture=dict(
            in_channels=8,
            dim=96,
            n_layers=6,
            n_refiner_layers=1,
            n_heads=4,
            cap_feat_dim=96,
            rope_theta=256.0,
            axes_dims=(8, 8, 8),
            axes_lens=(64, 16, 16),
            # Choices of the small experiment; the full-size network keeps Z-Image's own.
            npedit=dict(prediction="sample", position_embedding="sinusoidal", pad_multiple=16),
        ),
    )
    config.networks.text_encoder = network(
        "qwen3",
        architecture=dict(
            model_type="qwen3",
            vocab_size=41,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,  # the last one is never computed
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            attention_bias=False,
            tie_word_embeddings=True,
            hidden_act="silu",
        ),
    )
    config.data = ConfigDict(
        dict(
            reading=dict(workers=0, threads=1, buffer=4, max_bad_share=0.01),
            text_tokenizer="package:pretrained/easyvqa/text_encoder",
            text_length=16,  # tokens
            # The empty picture and other places of the shape are what a pretrained text-to-image model would know.
            options=dict(fraction=1.0, caption_dropout=0.1, plain_share=0.08, redraw=0.3, instruction_share=0.15),
        )
    )
    config.step = ConfigDict(dict(ema=0.995, skip_norm=1000.0, time_shift=3.0, weighting="clean", endpoint=0.0))
    rates = dict(denoiser=1e-2, text_encoder=5e-3)
    muon = dict(
        name="muon",
        final_learning_rate=1e-4,
        warmup_steps=50,
        b1=0.95,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=5.0,
    )
    config.optimizer = ConfigDict({name: dict(muon, learning_rate=rate) for name, rate in rates.items()})
    config.sampling = ConfigDict(dict(steps=12, time_shift=3.0))
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    config.offload = ()  # "optimizer" or names of frozen networks: in the hosts' memory between the updates
    config.checkpoint = ConfigDict(dict(every=1000, keep=2))
    config.guard = ConfigDict(dict(skipped_share=0.2, window=100, data_seconds=600.0))
    # wandb_project: of Weights & Biases, "" for none; profile_steps: first and last step of a jax.profiler trace.
    config.log = ConfigDict(dict(every=20, preview_every=1000, wandb_project="", profile_steps=()))
    return config


def network(kind: str, directory: str = "", architecture: dict | None = None) -> ConfigDict:
    """One network: its weights' directory, or the architecture of a fresh one."""
    # On a CPU, computing a block again is faster than reading what it left behind.
    options = dict(remat="full") if kind == "zimage" else {}
    return ConfigDict(dict(kind=kind, directory=directory, architecture=architecture or {}, options=options))
