"""NP-Edit at full size with the paper's scorer, LLaVA-OneVision-7B; all else as in configs/zimage/npedit.py.

Pod: python -m npedit_jax.train --config configs/zimage/npedit_llava.py --workdir gs://BUCKET/npedit-llava \
    --config.data.records=/mnt/BUCKET/records/edits/NAME/1.0.0
"""

from ml_collections import ConfigDict

from configs.zimage import npedit

LLAVA = "weights/llava-onevision-qwen2-7b-ov-hf"


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = npedit.get_config()
    config.networks.scorer = npedit.frozen("llava_onevision", LLAVA, remat="full")
    config.data.scorer_tokenizer = config.networks.scorer.get_ref("directory")
    # 730 tokens per image: an image is seen whole, stretched to 384 x 384 as the release does for its own scorer.
    # transformers' processor pads it to a square instead where there are several, and adds tiles where it is alone.
    config.data.question_length = 1792
    config.data.options.packed_length = 2560  # "remove" shows three images
    return config
