#!/usr/bin/env bash
# From nothing to an editor and its report: bash launch/quickstart.sh [--config.x=y ...]
# Makes .venv, installs the package, trains the editor on easy-VQA, evaluates it, writes runs/easyvqa/report.html.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv
fi
printf 'quickstart.sh: installs the package into .venv\n'
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"  # the small networks gain nothing from an accelerator
# With glibc, memory of one step is kept for the next instead of going back to the system: 10 to 15 % of a step.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" MALLOC_TOP_PAD_=268435456
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
# XLA's own loops and Eigen instead of YNNPACK: a fifth less time a step. Versions of XLA without it refuse the flag.
if plain="${XLA_FLAGS:-} --xla_cpu_experimental_ynn_fusion_type=" &&
  XLA_FLAGS="$plain" .venv/bin/python -c "import jax; jax.devices()" 2>/dev/null; then
  export XLA_FLAGS="$plain"
fi
printf 'quickstart.sh, 1 of 2: trains runs/easyvqa, some fifteen minutes on two cores\n'
.venv/bin/python -m npedit_jax.train --config configs/easyvqa/npedit.py --workdir runs/easyvqa "$@"
printf 'quickstart.sh, 2 of 2: edits the 1,000 test images in four ways each, some two minutes\n'
.venv/bin/python -m npedit_jax.evaluate --checkpoint runs/easyvqa --benchmark easyvqa \
  --output runs/easyvqa/evaluation --report runs/easyvqa/report.html
printf 'quickstart.sh: open runs/easyvqa/report.html\n'
