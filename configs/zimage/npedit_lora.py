"""NP-Edit at full size with LoRA: one frozen bfloat16 Z-Image serves student, fake score and real score.

Pod: python -m npedit_jax.train --config configs/zimage/npedit_lora.py --workdir gs://BUCKET/npedit-lora \
    --config.data.records=/mnt/BUCKET/records/edits/NAME/1.0.0
The student goes on with the adapters of configs/zimage/warmup_lora.py, read from weights/warmed-up-lora.
"""

from ml_collections import ConfigDict

from configs.zimage import npedit, warmup_lora


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = npedit.get_config()
    config.networks.student.directory = config.networks.real_score.directory
    config.lora = ConfigDict(
        warmup_lora.LORA
        | dict(
            base=dict(student="real_score", fake_score="real_score"),
            # The fake score has to begin as the real one: its adapters are fresh.
            start=dict(student="weights/warmed-up-lora", fake_score=""),
        )
    )
    for name in ("student", "fake_score"):
        config.optimizer[name].learning_rate = warmup_lora.LEARNING_RATE
        config.optimizer[name].final_learning_rate = warmup_lora.LEARNING_RATE
    return config
