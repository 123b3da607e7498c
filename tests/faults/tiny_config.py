"""The smallest experiment as a config file, so that the command itself can run it."""

from ml_collections import ConfigDict

from tests.training.tiny import autoencoder_config


def get_config() -> ConfigDict:
    """Checkpoints every 4 steps, a picture at every step: the pictures tell how far a killed run had come."""
    config = autoencoder_config(steps=24)
    config.checkpoint.every = 4
    config.log.preview_every = 1
    config.data.reading = dict(workers=0, threads=1, buffer=4, max_bad_share=0.01)
    return config
