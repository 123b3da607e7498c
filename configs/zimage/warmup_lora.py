"""Warm-up at full size with LoRA: adapters on a frozen bfloat16 Z-Image learn to copy the reference image.

Pod: python -m npedit_jax.train --config configs/zimage/warmup_lora.py --workdir gs://BUCKET/warmup-lora \
    --config.data.records=/mnt/BUCKET/records/edits/NAME/1.0.0
Then, for configs/zimage/npedit_lora.py:
python -m npedit_jax.export --checkpoint gs://BUCKET/warmup-lora --output weights/warmed-up-lora --format peft
"""

from ml_collections import ConfigDict

from configs.zimage import npedit, warmup

# The release lists LoRA as not done, so these numbers are ours; the rest (the clip at a norm of 2 among it) is
# that of the full run. Every matrix of every block but the modulation.
LORA = dict(rank=64, alpha=64.0, targets=("*/attention/*", "*/mlp/*"))
LEARNING_RATE = 1e-4  # five times the full run's: adapters start at zero and are scaled by alpha / rank


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = warmup.get_config()
    config.networks.base = npedit.frozen("zimage", "weights/Z-Image/transformer", **npedit.FLASH)
    config.lora = ConfigDict(LORA | dict(base=dict(student="base"), start=dict(student="")))
    config.optimizer.student.learning_rate = LEARNING_RATE
    config.optimizer.student.final_learning_rate = LEARNING_RATE / 20
    config.optimizer.student.weight_decay = 0.0  # decay would pull towards the base, which cannot copy
    return config
