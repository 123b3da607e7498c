"""Trains one stage: `python -m npedit_jax.train --config configs/X.py --workdir DIR [--config.a.b=v]`.

Started again with the same workdir it resumes. SIGTERM, a hangup and Ctrl-C make it save and end. A config is a Python
file and is executed: run only configs you trust. Exits with 2 on what a second start would find as well (arguments, the
config, weights that are not there), with 1 on a fault of the run, with 128 + the signal that asked for its end.
"""

import contextlib
import multiprocessing
import os
import sys
from typing import NoReturn

import jax
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from npedit_jax import commands

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file under configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and samples go; resumed when not empty.")


def main(argv: list[str]) -> int:
    """Command line; returns the exit status. What the user can mend is told in one line."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every rename at the level below
    if {"--help", "-h"} & set(argv):
        print(__doc__.strip())
        return 0
    path = _argument(argv, "--config")
    if path and not epath.Path(path).is_file():  # asked first: the library's own error is a page long
        return _refuse(FileNotFoundError(f"no config file at {path}; give the path of a file under configs/"))
    try:
        flags.mark_flags_as_required(["config", "workdir"])
        rest = flags.FLAGS(argv)[1:]
    except Exception as error:  # whatever a config file raises: it is the user's own Python
        return _refuse(error)
    if rest:
        return _refuse(ValueError(f"unexpected arguments {rest}; every option starts with --"))
    config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
    # Before anything asks for a device: the number of CPU devices is fixed from then on.
    jax.config.update("jax_num_cpu_devices", max(1, config.get("cpu_devices", 1)))  # a wrong one is told below

    from npedit_jax.data.batches import TooManyBadRecords
    from npedit_jax.training import faults, hosts, loop, previews, stages, stopping, workdir_lock, workdirs

    with contextlib.ExitStack() as held:
        try:
            hosts.join()
            workdirs.check(workdir, config)
            hosts.together("the working directory is checked")  # before process 0 writes to it
            held.enter_context(workdir_lock.held(workdir))
            stage = stages.build(config)
            if jax.process_index() == 0:
                workdirs.open_run(workdir, config)
            hosts.together("the working directory is opened")
        except workdirs.WorkdirUnavailable as error:
            return _fail(error)
        except (workdirs.WorkdirError, FileNotFoundError, ImportError, ValueError) as error:
            if (advice := commands.advice(error)) is None:
                raise
            return _refuse(ValueError(advice))
        except jax.errors.JaxRuntimeError as error:
            return _fail(_device_fault(error))
        # A restart finds its programs compiled.
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        try:
            loop.run(config, stage, workdir, preview=previews.Previews(config, workdir))
        except stopping.Stopped as stopped:
            _fail(stopped)
            return 128 + stopped.signal
        except (faults.RunFault, TooManyBadRecords, OSError) as fault:
            status = _fail(fault)
            if isinstance(fault, faults.DataStall):
                _end_without_waiting(status)
            return status
        except jax.errors.JaxRuntimeError as error:
            return _fail(_device_fault(error))
    return 0


def _refuse(error: Exception) -> int:
    _fail(error)
    return 2


def _device_fault(error: jax.errors.JaxRuntimeError) -> Exception:
    """What is behind an error of the devices; raises it where it is neither their memory nor another process."""
    if advice := commands.advice(error):
        return RuntimeError(advice)
    if jax.process_count() == 1:
        raise error
    return RuntimeError(f"process {jax.process_index()} lost another process of the run: {error}")


def _fail(error: Exception) -> int:
    while error.args and isinstance(error.args[0], Exception):  # as the config library wraps a field's name
        error = error.args[0]
    message = error.args[0] if isinstance(error, KeyError) else str(error)
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"train: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 1


def _end_without_waiting(status: int) -> NoReturn:
    """Ends the process although threads of it, or its workers, never will."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


def _argument(argv: list[str], name: str) -> str | None:
    """The value that the command line gives an option, as `--name value` or `--name=value`."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
