#!/usr/bin/env bash
# Installs this checkout, as committed, on every host: NAME=.. ZONE=.. launch/pod/setup.sh [--dry-run]
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[[ $# -eq 0 ]] || fail "unexpected argument '$1'"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

archive="$(mktemp -d)/npedit_jax.tar.gz"
trap 'rm -rf "$(dirname "$archive")"' EXIT
git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
for node in "${nodes[@]}"; do
  run gcloud compute tpus tpu-vm scp "$archive" "$node:npedit_jax.tar.gz" "${place[@]}" --worker=all
done
on_all_hosts "set -e; mkdir -p npedit_jax; tar -xzf npedit_jax.tar.gz -C npedit_jax; cd npedit_jax; \
[ -x .venv/bin/python ] || python3 -m venv .venv; .venv/bin/python -m pip install --quiet --editable '.[tpu]'"
