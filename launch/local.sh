#!/usr/bin/env bash
# Simulates N hosts on this machine, each a process with config.cpu_devices CPU devices of its own:
#   launch/local.sh [--dry-run] N --config configs/X.py --workdir DIR [--config.a.b=v ...]
# Lines are marked with the number of their host. Ctrl-C or SIGTERM go to all of them: they save and end together.
set -euo pipefail

usage() {
  sed -n '2,4p' "$0" >&2
  exit 2
}

dry_run=false
if [[ "${1:-}" == "--dry-run" ]]; then
  dry_run=true
  shift
fi
[[ "${1:-}" =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || usage
hosts="$1"
shift
python="${PYTHON:-python3}"
address="localhost:${PORT:-9123}"

processes=()
trap '(( ${#processes[@]} == 0 )) || kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT
for ((host = 0; host < hosts; host++)); do
  command=(env "JAX_PLATFORMS=cpu" "NPEDIT_HOSTS=$host/$hosts@$address" "$python" -m npedit_jax.train "$@")
  if "$dry_run"; then
    printf '%q ' "${command[@]}"
    printf '\n'
    continue
  fi
  "${command[@]}" > >(sed "s/^/[host $host] /") 2> >(sed "s/^/[host $host] /" >&2) &
  processes+=("$!")
done

# The first failure is the status; a signal interrupts `wait`, so each process is waited for until it is gone.
status=0
for process in "${processes[@]}"; do
  while kill -0 "$process" 2>/dev/null; do
    wait "$process" || true
  done
  result=0
  wait "$process" || result=$?
  ((status != 0)) || status="$result"
done
exit "$status"
