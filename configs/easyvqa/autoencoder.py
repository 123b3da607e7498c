"""The small autoencoder of the easy-VQA experiment: 64x64 pixels to 16x16 latents of 8 channels.

Laptop: python -m npedit_jax.train --config configs/easyvqa/autoencoder.py --workdir runs/easyvqa-autoencoder
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = ConfigDict()
    config.stage = "autoencoder"
    config.seed = 0
    config.steps = 8000
    config.batch_size = 16
    config.cpu_devices = 2

    config.networks = ConfigDict()
    config.networks.autoencoder = ConfigDict(
        dict(
            kind="autoencoder",
            directory="",
            architecture=dict(
                block_out_channels=(8, 16, 32),
                layers_per_block=1,
                latent_channels=8,
                norm_num_groups=8,
                scaling_factor=1.0,
                shift_factor=0.0,
                mid_block_add_attention=True,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            options=ConfigDict(),
        )
    )
    config.data = ConfigDict(
        dict(
            reading=dict(workers=0, threads=1, buffer=4, max_bad_share=0.01),
            options=dict(fraction=1.0, plain_share=0.05, redraw=0.3),
        )
    )
    config.step = ConfigDict(dict(ema=0.995, skip_norm=100.0, kl_weight=1e-4))
    config.optimizer = ConfigDict(
        dict(
            autoencoder=dict(
                name="adam",
                learning_rate=3e-3,
                final_learning_rate=1e-5,
                warmup_steps=100,
                b1=0.9,
                b2=0.99,
                weight_decay=0.0,
                clip_norm=1.0,
            )
        )
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    config.offload = ()  # "optimizer" or names of frozen networks: in the hosts' memory between the updates
    config.checkpoint = ConfigDict(dict(every=500, keep=2))
    config.guard = ConfigDict(dict(skipped_share=0.2, window=100, data_seconds=600.0))
    # wandb_project: of Weights & Biases, "" for none; profile_steps: first and last step of a jax.profiler trace.
    config.log = ConfigDict(dict(every=20, preview_every=1000, wandb_project="", profile_steps=()))
    return config
