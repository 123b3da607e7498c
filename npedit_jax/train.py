"""Trains one stage: `python -m npedit_jax.train --config configs/X.py --workdir DIR [--config.a.b=v]`.

Started again with the same workdir it resumes. A config is a Python file and is executed: run only configs you trust.
"""

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file under configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and samples go; resumed when not empty.")


def main(argv: list[str]) -> None:
    """Runs the stage that the config names."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells every rename at the level below
    config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
    # Before anything asks for a device: the number of CPU devices is fixed from then on.
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)

    from npedit_jax.training import loop, previews, workdirs

    workdirs.open_run(workdir, config)
    loop.run(config, workdir, preview=previews.Previews(config, workdir))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
