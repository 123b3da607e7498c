#!/usr/bin/env bash
# Runs the test suite in .venv, which it makes where there is none: bash launch/test.sh [--slow] [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv
fi
# First and by itself: the ranges that other packages ask for are then met, and no second build is looked at.
.venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
.venv/bin/ruff check .
export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest --numprocesses 2 --dist worksteal --durations 10 "$@"
