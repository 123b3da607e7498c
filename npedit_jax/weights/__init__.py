"""Weights to and from Hugging Face checkpoints: one name-mapping table per network, read both ways."""

from npedit_jax.weights.kinds import KINDS as KINDS
from npedit_jax.weights.kinds import build as build
from npedit_jax.weights.loading import load as load
from npedit_jax.weights.saving import save as save
