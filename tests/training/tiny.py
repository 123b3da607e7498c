"""The smallest experiment that runs through the whole loop."""

from ml_collections import ConfigDict

AUTOENCODER = dict(
    block_out_channels=(4, 4),
    layers_per_block=1,
    latent_channels=2,
    norm_num_groups=2,
    scaling_factor=1.0,
    shift_factor=0.0,
    mid_block_add_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
# What all the tests' runs have in common.
READING = dict(workers=0, threads=1, buffer=4, max_bad_share=0.01)
RUN = dict(
    mesh=dict(data=-1, fsdp=1, tensor=1),
    offload=(),
    guard=dict(skipped_share=0.2, window=100, data_seconds=600.0),
)
LOG = dict(every=1, wandb_project="", profile_steps=())


def autoencoder_config(steps: int = 6) -> ConfigDict:
    """A run of a few steps on real images: seconds on one core."""
    adam = dict(
        name="adam",
        learning_rate=1e-2,
        final_learning_rate=1e-3,
        warmup_steps=2,
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    network = dict(kind="autoencoder", directory="", architecture=AUTOENCODER, options=dict(remat="none"))
    return ConfigDict(
        dict(
            stage="autoencoder",
            seed=0,
            steps=steps,
            batch_size=2,
            cpu_devices=1,
            networks=dict(autoencoder=network),
            data=dict(reading=READING, options=dict(fraction=1.0, plain_share=0.1, redraw=0.5)),
            step=dict(ema=0.9, skip_norm=100.0, kl_weight=1e-4),
            optimizer=dict(autoencoder=adam),
            checkpoint=dict(every=2, keep=2),
            log=LOG | dict(preview_every=3),
        )
        | RUN
    )
