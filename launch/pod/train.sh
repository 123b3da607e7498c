#!/usr/bin/env bash
# Trains on every host, and goes on after a preemption or a crash:
#   NAME=.. ZONE=.. [TYPE=.. VERSION=..] launch/pod/train.sh [--dry-run] --config configs/X.py --workdir gs://BUCKET/RUN [...]
# The same command on every host; the run resumes from its newest checkpoint, so the workdir must be on a bucket. With TYPE
# and VERSION set, a slice that was taken away is asked for again. RETRIES (default 20) bounds the restarts.
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
printf -v arguments '%q ' "$@"
printf -v flags '%q' "${XLA_TPU_FLAGS[*]}"
command="cd npedit_jax && NPEDIT_HOSTS=auto LIBTPU_INIT_ARGS=$flags .venv/bin/python -m npedit_jax.train ${arguments}\
2>&1 | tee -a \"\$HOME/train.log\"; exit \"\${PIPESTATUS[0]}\""
printf -v command 'bash -c %q' "$command"

for ((attempt = 0; attempt <= ${RETRIES:-20}; attempt++)); do
  if on_all_hosts "$command"; then exit 0; fi
  found="$(state)"
  printf '%s: attempt %d ended; %s is %s\n' "$script" "$((attempt + 1))" "$NAME" "${found:-gone}" >&2
  if [[ "$found" != "ACTIVE" ]]; then
    [[ -n "${TYPE:-}" && -n "${VERSION:-}" ]] || fail "set TYPE and VERSION to have the slice asked for again"
    if [[ -n "$found" ]]; then "$here/delete.sh"; fi
    "$here/create.sh"
    "$here/setup.sh"
  fi
  sleep "${RESTART_SECONDS:-10}"
done
fail "gave up after $attempt attempts; launch/pod/logs.sh fetches what the hosts wrote"
