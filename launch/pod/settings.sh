# Shared by the scripts beside it, which source it: what to run on, and `run`, which prints commands under --dry-run.
# shellcheck shell=bash
#
# Set in the environment:
#   NAME      of the queued resource and its TPU VMs
#   ZONE      such as us-east5-a
#   TYPE      accelerator type, such as v5p-128 (docs/pods.md says which)
#   VERSION   TPU software version, such as v2-alpha-tpuv5 (gcloud compute tpus versions list)
#   PROJECT   Google Cloud project; by default that of gcloud's configuration
#   SPOT      true: cheaper, may be taken away at any time (default); false: on demand
#   PYTHON    for setup.sh: Python 3.11 or newer on the hosts (default python3)
#   SLICES    slices of a multi-slice job (default 1)
#   EXTRAS    for setup.sh: of the package, to install beside it (default tpu; tpu,wandb with Weights & Biases)
#   MOUNT     a bucket, without gs://, that the hosts are to have under /mnt (Cloud Storage FUSE)
#   PASS      for train.sh: names of variables, set here, that the hosts' training is to have too, such as
#             "JAX_DEFAULT_MATMUL_PRECISION WANDB_API_KEY"
set -euo pipefail

script="$(basename "$0")"
dry_run=false
if [[ "${1:-}" == "--dry-run" ]]; then
  dry_run=true
  shift
fi

fail() {
  printf '%s: %s\n' "$script" "$1" >&2
  exit 2
}

require() {
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || fail "set $name, see launch/pod/settings.sh"
  done
}

run() {
  if "$dry_run"; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

require NAME ZONE
SPOT="${SPOT:-true}"
SLICES="${SLICES:-1}"
[[ "$SPOT" == "true" || "$SPOT" == "false" ]] || fail "SPOT must be true or false, found '$SPOT'"
[[ "$SLICES" =~ ^[1-9][0-9]*$ ]] || fail "SLICES must be a whole number above 0, found '$SLICES'"
[[ "${MOUNT:-}" =~ ^[a-z0-9._-]*$ ]] || fail "MOUNT must be the name of a bucket, without gs://, found '$MOUNT'"
place=("--zone=$ZONE")
[[ -z "${PROJECT:-}" ]] || place+=("--project=$PROJECT")

# The TPU VMs of the job, one a slice.
# shellcheck disable=SC2153  # given by the user, checked above
nodes=("$NAME")
if ((SLICES > 1)); then
  nodes=()
  for ((slice = 0; slice < SLICES; slice++)); do
    nodes+=("$NAME-$slice")
  done
fi

# The same command on every host of every slice at once; fails if it fails anywhere.
on_all_hosts() {
  local command="$1" node processes=() process status=0
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all "--command=$command" &
    processes+=("$!")
    if "$dry_run"; then wait "$!"; fi
  done
  for process in "${processes[@]}"; do
    wait "$process" || status="$?"
  done
  return "$status"
}

# Prints ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED (taken away), FAILED, ...; NONE where there is no such request.
# Fails, and prints what gcloud says, where that cannot be told.
state() {
  local told status=0
  told="$(mktemp)"
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" "--format=value(state.state)" 2>"$told" || status="$?"
  if ((status != 0)) && grep -q NOT_FOUND "$told"; then
    printf 'NONE\n'
    status=0
  fi
  ((status == 0)) || cat "$told" >&2
  rm -f "$told"
  return "$status"
}
