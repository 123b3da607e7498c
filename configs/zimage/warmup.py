"""Warm-up at full size: the student learns to copy its reference image, starting from Z-Image.

Pod: python -m npedit_jax.train --config configs/zimage/warmup.py --workdir gs://BUCKET/warmup \
    --config.data.records=/mnt/BUCKET/records/edits/NAME/1.0.0
"""

from ml_collections import ConfigDict

from configs.zimage import npedit


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = ConfigDict()
    config.stage = "warmup"
    config.seed = 0
    config.steps = 5000  # the release's, as all that says nothing else
    config.batch_size = 64  # over all chips, one each on a v5p:4x4x4; the release: 2 per device
    config.cpu_devices = 1

    config.networks = ConfigDict()
    config.networks.autoencoder = npedit.network("autoencoder", "weights/Z-Image/vae", dtype="float32")
    config.networks.text_encoder = npedit.frozen("qwen3", "weights/Z-Image/text_encoder")
    # Parameters in float32; the release's are bfloat16.
    trained = dict(dtype="bfloat16", remat="full", **npedit.FLASH)
    config.networks.student = npedit.network("zimage", "weights/Z-Image/transformer", **trained)
    config.data = ConfigDict(
        dict(
            records="records/edits/edits/1.0.0",
            buckets=npedit.BUCKETS,
            reading=npedit.READING,
            text_tokenizer="weights/Z-Image/tokenizer",
            text_length=512,  # tokens
            options=dict(caption_dropout=0.1, fraction=1.0, flip=0.5),
        )
    )
    config.step = ConfigDict(
        dict(
            ema=0.999,  # less at first, (1 + step) / (10 + step); the release keeps none
            skip_norm=100.0,
            skip_from=1000,
            accumulate=1,  # parts of a batch, one after the other: a larger batch in the same memory
            time_shift=6.0,
            weighting="logit_normal",
            endpoint=0.0,  # an option of ours that is off
        )
    )
    adam = dict(
        name="adam",
        learning_rate=2e-5,
        final_learning_rate=1e-6,
        warmup_steps=1000,
        b1=0.9,
        b2=0.99,
        weight_decay=0.01,  # of matrices, not of norms and biases
        clip_norm=2.0,  # the release's, as in the edit stage; skip_norm goes by the norm before the clip
    )
    config.optimizer = ConfigDict(dict(student=adam))
    config.sampling = ConfigDict(dict(times=npedit.TIMES, sampler="ddim", eta=1.0))
    config.mesh = ConfigDict(dict(data=-1, fsdp=16, tensor=1))
    config.offload = ()  # "optimizer" or names of frozen networks: in the hosts' memory between the updates
    config.checkpoint = ConfigDict(dict(every=250, keep=3))  # what a spot slice loses at most; the release: 500
    config.guard = ConfigDict(dict(skipped_share=0.2, window=100, data_seconds=600.0))
    # wandb_project: of Weights & Biases, "" for none; profile_steps: first and last step of a jax.profiler trace.
    config.log = ConfigDict(dict(every=10, preview_every=250, wandb_project="", profile_steps=()))
    return config
