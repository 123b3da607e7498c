#!/usr/bin/env bash
# Installs this checkout, as committed, on every host: NAME=.. ZONE=.. launch/pod/setup.sh [--dry-run]
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[[ $# -eq 0 ]] || fail "unexpected argument '$1'"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
extras="${EXTRAS:-tpu}"
[[ "$extras" =~ ^[a-z,]+$ ]] || fail "EXTRAS must be names with commas between them, found '$extras'"

# TPU VM images come with Ubuntu's Python, of 22.04 with 3.10. Told before anything is copied over what is there.
printf -v python '%q' "${PYTHON:-python3}"
needed='import sys; sys.exit(sys.version_info < (3, 11))'
told="setup.sh: $python on this host is not Python 3.11 or newer: install one, on Ubuntu 22.04 by \
sudo apt-get install python3.11-venv, and start again with PYTHON=python3.11"
on_all_hosts "$python -c '$needed' || { echo '$told' >&2; exit 1; }"

if [[ -n "${MOUNT:-}" ]]; then
  on_all_hosts "command -v gcsfuse >/dev/null || { echo 'setup.sh: this host has no gcsfuse, which MOUNT needs: \
install Cloud Storage FUSE on every host, and start again' >&2; exit 1; }; \
sudo mkdir -p /mnt/$MOUNT && sudo chown \"\$(id -u)\" /mnt/$MOUNT"
fi

archive="$(mktemp -d)/npedit_jax.tar.gz"
trap 'rm -rf "$(dirname "$archive")"' EXIT
git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
for node in "${nodes[@]}"; do
  run gcloud compute tpus tpu-vm scp "$archive" "$node:npedit_jax.tar.gz" "${place[@]}" --worker=all
done
on_all_hosts "set -e; mkdir -p npedit_jax; tar -xzf npedit_jax.tar.gz -C npedit_jax; cd npedit_jax; \
[ -x .venv/bin/python ] || $python -m venv .venv; .venv/bin/python -m pip install --quiet --editable '.[$extras]'"
