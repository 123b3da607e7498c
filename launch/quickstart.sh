#!/usr/bin/env bash
# From nothing to an editor and its report: bash launch/quickstart.sh [--config.x=y ...]
# Makes .venv, installs the package, trains the editor on easy-VQA, evaluates it, writes runs/easyvqa/report.html.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
.venv/bin/python -m npedit_jax.train --config configs/easyvqa/npedit.py --workdir runs/easyvqa "$@"
.venv/bin/python -m npedit_jax.evaluate --checkpoint runs/easyvqa --benchmark easyvqa \
  --output runs/easyvqa/evaluation --report runs/easyvqa/report.html
