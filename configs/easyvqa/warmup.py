"""Teaches the small student to copy its reference image, starting from the base model.

Laptop: python -m npedit_jax.train --config configs/easyvqa/warmup.py --workdir runs/easyvqa-warmup
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = ConfigDict()
    config.stage = "warmup"
    config.seed = 0
    config.steps = 1000
    config.batch_size = 16
    config.cpu_devices = 1

    config.networks = ConfigDict()
    config.networks.autoencoder = network("autoencoder", "package:pretrained/easyvqa/vae")
    config.networks.student = network("zimage", "package:pretrained/easyvqa/transformer")
    config.networks.text_encoder = network("qwen3", "package:pretrained/easyvqa/text_encoder")
    config.data = ConfigDict(
        dict(
            reading=dict(workers=0, threads=1, buffer=4, max_bad_share=0.01),
            text_tokenizer="package:pretrained/easyvqa/text_encoder",
            text_length=16,  # tokens
            # Under an instruction too the reference is copied: what follows instructions is learned in the edit stage.
            options=dict(fraction=1.0, caption_dropout=0.1, instruction_share=0.03),
        )
    )
    # Copying matters most at pure noise, where the few-step editor starts.
    config.step = ConfigDict(dict(ema=0.98, skip_norm=1000.0, time_shift=3.0, weighting="time", endpoint=0.3))
    config.optimizer = ConfigDict(
        dict(
            student=dict(
                name="muon",
                learning_rate=4e-3,
                final_learning_rate=1e-4,
                warmup_steps=50,
                b1=0.95,
                b2=0.99,
                weight_decay=0.0,
                clip_norm=5.0,
            )
        )
    )
    config.sampling = ConfigDict(dict(times=(1.0, 0.9, 0.75, 0.5), sampler="fresh", eta=1.0))
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    config.offload = ()  # "optimizer" or names of frozen networks: in the hosts' memory between the updates
    config.checkpoint = ConfigDict(dict(every=200, keep=2))
    config.guard = ConfigDict(dict(skipped_share=0.2, window=100, data_seconds=600.0))
    # wandb_project: of Weights & Biases, "" for none; profile_steps: first and last step of a jax.profiler trace.
    config.log = ConfigDict(dict(every=20, preview_every=300, wandb_project="", profile_steps=()))
    return config


def network(kind: str, directory: str) -> ConfigDict:
    """One network with the directory of its weights."""
    # On a CPU, computing a block again is faster than reading what it left behind.
    options = dict(remat="full") if kind == "zimage" else {}
    return ConfigDict(dict(kind=kind, directory=directory, architecture={}, options=options))
