#!/usr/bin/env bash
# Asks for a TPU slice, or several, and waits until it is there:
#   NAME=.. ZONE=.. TYPE=.. VERSION=.. launch/pod/create.sh [--dry-run]
# A queued resource: the request waits in line where no chips are free. See settings.sh for SPOT and SLICES.
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[[ $# -eq 0 ]] || fail "unexpected argument '$1'"
require TYPE VERSION

request=("$NAME" "${place[@]}" "--accelerator-type=$TYPE" "--runtime-version=$VERSION")
if ((SLICES > 1)); then
  request+=("--node-count=$SLICES" "--node-prefix=$NAME")
else
  request+=("--node-id=$NAME")
fi
[[ "$SPOT" == "false" ]] || request+=("--spot")
run gcloud compute tpus queued-resources create "${request[@]}"
if "$dry_run"; then exit 0; fi

lost=0
while true; do
  if found="$(state)" && [[ "$found" != "NONE" ]]; then
    lost=0
  else
    lost=$((lost + 1))
    ((lost < 10)) || fail "$NAME was asked for, and cannot be seen: look with gcloud compute tpus queued-resources list"
  fi
  case "$found" in
    ACTIVE) break ;;
    FAILED | SUSPENDED | SUSPENDING) fail "the request came to state $found; launch/pod/delete.sh, then create again" ;;
  esac
  printf '%s: %s\n' "$script" "${found:-no answer}"
  sleep "${POLL_SECONDS:-30}"
done
printf '%s: %s is active\n' "$script" "$NAME"
