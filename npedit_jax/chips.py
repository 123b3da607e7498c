"""Published peaks of TPU chips, and the devices of a topology that this machine does not have.

Source: Google Cloud's documentation, the pages of each TPU version and the table of the page TPU7x. The interconnect
figure is what a chip receives over all its links, half of what is published for both directions; the network figure a
chip's share of the data centre's.
"""

import dataclasses
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

# A libtpu that looks for a TPU here would wait for a metadata server; a second one would stop at the first one's lock.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a topology has.

    Attributes:
      flops: bfloat16 FLOP/s.
      memory: bytes of HBM.
      bandwidth: bytes/s of HBM.
      interconnect: bytes/s that arrive from other chips of the slice.
      network: bytes/s that arrive from other slices.
      devices: per chip: where a chip is two devices, each figure above is half the chip's.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    network: float = 6.25e9
    devices: int = 1


CHIPS = {
    "v5e": Chip(flops=197e12, memory=16e9, bandwidth=819e9, interconnect=200e9),
    "v5p": Chip(flops=459e12, memory=95e9, bandwidth=2765e9, interconnect=600e9),
    "v6e": Chip(flops=918e12, memory=32e9, bandwidth=1638e9, interconnect=400e9, network=12.5e9),
    "tpu7x": Chip(flops=1153.5e12, memory=96e9, bandwidth=3690e9, interconnect=300e9, devices=2),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5p:4x4x4"; raises ValueError where it has no known chip or form."""
    name, _, size = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", size):
        raise ValueError(f"unknown topology {topology!r}; give CHIP:AxB or CHIP:AxBxC with CHIP one of {list(CHIPS)}")
    return CHIPS[name]


def devices_of(topology: str, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of a topology; programs can be compiled for them, not run.

    Raises:
      ValueError: libtpu is not installed, or the compiler does not know the topology.
    """
    chip_of(topology)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # jax read its environment when it was imported
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
    except Exception as error:  # whatever the plugin raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"no TPU compiler for {topology}: {reason}; install jax[tpu], whose libtpu works on a machine without TPU"
        ) from error


# What jax calls a device, in lower case, by the start of its name; of "TPU v5p" and "TPU v5" both are v5p.
KINDS = {"tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v6": "v6e", "tpu7x": "tpu7x", "tpu v5": "v5p"}
# Dense bfloat16 FLOP/s of NVIDIA's data sheets, of the SXM cards.
GPUS = {"nvidia a100": 312e12, "nvidia h100 pcie": 756e12, "nvidia h100": 989e12, "nvidia h200": 989e12}


def peak_flops(device: jax.Device) -> float | None:
    """Published bfloat16 FLOP/s of a device; None of one that is not in the tables."""
    kind = device.device_kind.lower()
    peaks = {start: CHIPS[name].flops for start, name in KINDS.items()} | GPUS
    return next((peak for start, peak in peaks.items() if kind.startswith(start)), None)
