"""The main job in small with LoRA: adapters on the warmed-up student and on the base model, 4.8 % of their size.

Laptop: python -m npedit_jax.train --config configs/easyvqa/npedit_lora.py --workdir runs/easyvqa-lora
"""

from ml_collections import ConfigDict

from configs.easyvqa import npedit


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = npedit.get_config()
    config.networks.warmup = npedit.network("zimage", "warmup")
    config.lora = ConfigDict(
        dict(
            rank=5,
            alpha=5.0,
            targets=("*/attention/*", "*/mlp/*"),
            base=dict(student="warmup", fake_score="real_score"),
            start=dict(student="", fake_score=""),
        )
    )
    # Adam instead of Muon: Muon would make every update of a factor of rank 5 one of full rank in it.
    adam = dict(
        name="adam",
        learning_rate=3e-3,
        final_learning_rate=3e-4,
        warmup_steps=10,
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=2.0,
    )
    config.optimizer = ConfigDict(dict(student=adam, fake_score=adam))
    return config
