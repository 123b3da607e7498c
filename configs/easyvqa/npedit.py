"""The main job in small: an editor of easy-VQA images learned without a single pair.

Laptop: python -m npedit_jax.train --config configs/easyvqa/npedit.py --workdir runs/easyvqa
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = ConfigDict()
    config.stage = "npedit"
    config.seed = 0
    config.steps = 520
    config.batch_size = 16
    config.fake_updates = 1  # per student update; 5 in the release, 10 in the paper
    config.separate_steps = False
    config.cpu_devices = 1

    config.networks = ConfigDict()
    config.networks.autoencoder = network("autoencoder", "vae")
    config.networks.text_encoder = network("qwen3", "text_encoder")
    config.networks.real_score = network("zimage", "transformer")
    config.networks.fake_score = network("zimage", "transformer")
    config.networks.student = network("zimage", "warmup")
    config.networks.scorer = network("internvl", "scorer")
    config.data = ConfigDict(
        dict(
            reading=dict(workers=0, threads=1, buffer=4, max_bad_share=0.01),
            text_tokenizer="package:pretrained/easyvqa/text_encoder",
            text_length=16,  # tokens
            scorer_tokenizer="package:pretrained/easyvqa/scorer",
            question_length=72,  # tokens, of which 16 per image
            templates="easyvqa",
            options=dict(
                fraction=1.0,  # of the reference images
                edit_weights=dict(recolor=0.3, remove=0.25, replace=0.4, nothing=0.05),
                guidance=dict(recolor=2.0, remove=2.0, replace=2.0, nothing=2.0),
                question_weights=(1.0, 1.0),
                negative_prompt="",  # the base model knows the empty caption; it has no word for bad quality
            ),
        )
    )
    config.step = ConfigDict(
        dict(
            times=(1.0, 0.9, 0.75, 0.5),
            max_unroll=2,
            dmd_weight=4.0,
            scorer_weight=0.5,
            identity_weight=1.0,
            dmd_normalizer="sample",
            dmd_low=0.02,
            dmd_high=0.98,
            time_shift=3.0,
            scorer_form="yes_no",
            temperature_start=0.1,
            temperature_end=1.0,
            temperature_steps=120,
            scorer_clip=True,
            scorer_noise=0.05,
            ema=0.97,
            skip_norm=300.0,
        )
    )
    muon = dict(
        name="muon",
        learning_rate=3e-3,
        final_learning_rate=1e-4,
        warmup_steps=10,
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=2.0,
    )
    config.optimizer = ConfigDict(dict(student=muon, fake_score=muon))
    config.sampling = ConfigDict(dict(times=config.step.get_ref("times"), sampler="fresh", eta=1.0))
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    config.offload = ()  # "optimizer" or names of frozen networks: in the hosts' memory between the updates
    config.checkpoint = ConfigDict(dict(every=100, keep=2))
    config.guard = ConfigDict(dict(skipped_share=0.2, window=100, data_seconds=600.0))
    # wandb_project: of Weights & Biases, "" for none; profile_steps: first and last step of a jax.profiler trace.
    config.log = ConfigDict(dict(every=10, preview_every=100, wandb_project="", profile_steps=()))
    return config


def network(kind: str, name: str) -> ConfigDict:
    """One of the shipped networks."""
    # On a CPU, computing a block again is faster than reading what it left behind.
    options = dict(remat="full") if kind == "zimage" else {}
    directory = f"package:pretrained/easyvqa/{name}"
    return ConfigDict(dict(kind=kind, directory=directory, architecture={}, options=options))
