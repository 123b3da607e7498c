"""Compiles every program of a run for a TPU topology on a machine that has none, and says whether it fits and how fast
it can be: `python -m npedit_jax.compile --config configs/X.py --topology v5p:4x4x4 [--json F] [--config.a.b=v]`.

Needs libtpu (the extra `tpu`), but neither chips, weights nor data. Exits with 1 where a program does not compile or
peaks above 85 % of a device's memory. A config is a Python file and is executed: run only configs you trust.
"""

import json
import sys

from absl import app, flags
from etils import epath
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file under configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:AxB or CHIP:AxBxC, one slice of it: v5p:4x4x4, v6e:8x8, ...")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of a multi-slice job.", lower_bound=1)
_SIZE = flags.DEFINE_string("size", "512x512", "Height x width of the pictures, a bucket of the config.")
_ONLY = flags.DEFINE_string("only", "", "Compile only programs whose name holds this.")
_TEXT = flags.DEFINE_string("text", None, "Also write each compiled program's text to this directory.")
_JSON = flags.DEFINE_string("json", None, "Also write the report to this file.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
    """Command line."""
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option starts with --")
    from npedit_jax import chips

    try:
        chip = chips.chip_of(_TOPOLOGY.value)
        devices = chips.devices_of(_TOPOLOGY.value, _SLICES.value)
        from npedit_jax import parallel
        from npedit_jax.compilation import report

        config = _CONFIG.value
        mesh = parallel.make_mesh(**config.mesh.to_dict(), devices=devices)
        height, _, width = _SIZE.value.partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise ValueError(f"--size is HEIGHTxWIDTH, such as 512x512; found {_SIZE.value!r}")
        text = epath.Path(_TEXT.value) if _TEXT.value else None
        found = report.compile_run(config, mesh, chip, (int(height), int(width)), only=_ONLY.value, text=text)
    except ValueError as error:
        sys.exit(f"compile: {error}")
    print(report.text(found, f"{_TOPOLOGY.value} x {_SLICES.value}"))
    if _JSON.value:
        epath.Path(_JSON.value).write_text(json.dumps(found.to_json(), indent=2) + "\n")
    if not found.fits:
        sys.exit(f"compile: does not fit on {_TOPOLOGY.value}: {len(found.failures)} of its programs; see above")


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):  # absl's own help exits with 1
        print(__doc__.strip(), flags.FLAGS.main_module_help(), sep="\n")
        sys.exit()
    app.run(main)
