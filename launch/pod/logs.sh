#!/usr/bin/env bash
# Fetches train.log of every host to a directory: NAME=.. ZONE=.. launch/pod/logs.sh [--dry-run] DIRECTORY
# HOSTS (default 1) is the number of hosts of a slice.
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[[ $# -eq 1 ]] || fail "give the directory to write to"
HOSTS="${HOSTS:-1}"
[[ "$HOSTS" =~ ^[1-9][0-9]*$ ]] || fail "HOSTS must be a whole number above 0, found '$HOSTS'"
run mkdir -p "$1"
for node in "${nodes[@]}"; do
  for ((host = 0; host < HOSTS; host++)); do
    run gcloud compute tpus tpu-vm scp "$node:train.log" "$1/$node-$host.log" "${place[@]}" "--worker=$host"
  done
done
