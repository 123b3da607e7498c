#!/usr/bin/env bash
# Trains on every host, and goes on after a preemption or a crash:
#   NAME=.. ZONE=.. [TYPE=.. VERSION=..] launch/pod/train.sh [--dry-run] --config configs/X.py --workdir gs://BUCKET/RUN [...]
# The same command on every host (host.sh); the run resumes from its newest checkpoint, so the workdir must be on a bucket.
# With TYPE and VERSION set, a slice that was taken away is asked for again. RETRIES (default 20) bounds the restarts;
# arguments that the training refuses (status 2) end it at once. Ctrl-C here leaves the hosts alone: stop.sh.
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ $# -gt 0 ]] || fail "give the arguments of npedit_jax.train, --config and --workdir at least"
workdir=""
previous=""
for argument in "$@"; do
  [[ "$argument" != --workdir=* ]] || workdir="${argument#--workdir=}"
  [[ "$previous" != "--workdir" ]] || workdir="$argument"
  previous="$argument"
done
[[ "$workdir" == gs://* ]] || fail "--workdir must be on a bucket (gs://...), which all hosts can reach; found '$workdir'"

# shellcheck source=xla_flags.sh
source "$here/xla_flags.sh"
settings=("NPEDIT_HOSTS=auto" "LIBTPU_INIT_ARGS=${XLA_TPU_FLAGS[*]}" "MOUNT=${MOUNT:-}")
for name in ${PASS:-}; do
  [[ -n "${!name+set}" ]] || fail "PASS names $name, which is not set here"
  settings+=("$name=${!name}")
done
printf -v command '%q ' env "${settings[@]}" npedit_jax/launch/pod/host.sh train "$@"
NO_CHECKOUT=3
command="[ -x npedit_jax/launch/pod/host.sh ] || exit $NO_CHECKOUT; exec $command"
printf -v command 'bash -c %q' "$command"

# Sees to it that there is a slice, with the checkout on all of its hosts. Fails where it may be mended by asking again.
set_up=true
prepare() {
  local found
  found="$(state)" || return 1
  printf '%s: %s is %s\n' "$script" "$NAME" "$found" >&2
  if [[ "$found" != "ACTIVE" ]]; then
    [[ -n "${TYPE:-}" && -n "${VERSION:-}" ]] || fail "set TYPE and VERSION to have the slice asked for again"
    set_up=false
    if [[ "$found" != "NONE" ]]; then "$here/delete.sh" || return 1; fi
    "$here/create.sh" || return 1
  fi
  "$set_up" || "$here/setup.sh" || return 1
  set_up=true
}

# shellcheck disable=SC2329  # by the trap
let_go() {
  local connections
  mapfile -t connections < <(jobs -p)
  ((${#connections[@]} == 0)) || kill "${connections[@]}" 2>/dev/null || true
  printf '%s: the hosts go on; launch/pod/stop.sh makes them save and end\n' "$script" >&2
  exit 130
}
trap let_go INT TERM
for ((attempt = 0; attempt <= ${RETRIES:-20}; attempt++)); do
  if ((attempt == 0)) || prepare; then
    status=0
    on_all_hosts "$command" || status="$?"
    ((status != 0)) || exit 0
    ((status != 2)) || fail "the training refused its arguments, see above"
    ((status != NO_CHECKOUT)) || set_up=false
    printf '%s: attempt %d ended with status %d\n' "$script" "$((attempt + 1))" "$status" >&2
  fi
  sleep "${RESTART_SECONDS:-10}"
done
fail "gave up after $attempt attempts; launch/pod/logs.sh fetches what the hosts wrote"
