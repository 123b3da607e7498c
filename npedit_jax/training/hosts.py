"""Many processes as one run: joining them, and stopping them at the same step."""

import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

VARIABLE = "NPEDIT_HOSTS"  # "auto", or "NUMBER/COUNT@HOST:PORT" with the address of process 0
# A process that is gone is noticed after this time at the latest, and ends the others.
HEARTBEAT_SECONDS = 20


def join(environment: Mapping[str, str] = os.environ) -> bool:
    """Joins the processes of a run, where the environment asks for it; before any device is asked for.

    "auto" finds the others where JAX can: on TPU VMs, Slurm, Open MPI, Kubernetes.

    Raises:
      ValueError: the variable is of another form.
    """
    value = environment.get(VARIABLE, "")
    if not value:
        return False
    by_hand = re.fullmatch(r"(\d+)/(\d+)@(\S+:\d+)", value)
    if value != "auto" and not (by_hand and int(by_hand[1]) < int(by_hand[2])):
        raise ValueError(
            f"{VARIABLE} must be auto or NUMBER/COUNT@HOST:PORT, such as 0/2@localhost:9000; found {value!r}"
        )
    arguments = (by_hand[3], int(by_hand[2]), int(by_hand[1])) if by_hand else ()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        *arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS
    )
    return True


def together(what: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def stop_at(step: int) -> bool:
    """Whether all processes stop after this step, since one of them got SIGTERM; False for a process by itself.

    All processes ask at every step. The one with the notice tells the others, and they agree on the first step that
    none of them is past.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
