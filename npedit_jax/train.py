"""Trains one stage: `python -m npedit_jax.train --config configs/X.py --workdir DIR [--config.a.b=v]`.

Started again with the same workdir it resumes. A config is a Python file and is executed: run only configs you trust.
"""

import sys

import jax
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file under configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and samples go; resumed when not empty.")


def main(argv: list[str]) -> int:
    """Command line; returns the exit status. What the user can mend is told in one line."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every rename at the level below
    path = _argument(argv, "--config")
    if path and not epath.Path(path).exists():  # asked first: the library's own error is a page long
        return _fail(FileNotFoundError(f"no config file at {path}; give the path of a file under configs/"))
    try:
        flags.mark_flags_as_required(["config", "workdir"])
        rest = flags.FLAGS(argv)[1:]
    except Exception as error:  # whatever a config file raises: it is the user's own Python
        return _fail(error)
    if rest:
        return _fail(ValueError(f"unexpected arguments {rest}; every option starts with --"))
    config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
    # Before anything asks for a device: the number of CPU devices is fixed from then on.
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)

    from npedit_jax.data.batches import TooManyBadRecords
    from npedit_jax.training import loop, previews, stages, workdirs

    try:
        workdirs.check(workdir, config)
        stage = stages.build(config)
        workdirs.open_run(workdir, config)
    except (workdirs.WorkdirError, FileNotFoundError, ValueError) as error:
        return _fail(error)
    try:
        loop.run(config, stage, workdir, preview=previews.Previews(config, workdir))
    except TooManyBadRecords as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    message = error.args[0] if isinstance(error, KeyError) else str(error)
    print(f"train: {' '.join(message.split())}", file=sys.stderr)
    return 1


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
