#!/usr/bin/env bash
# Example: two v6e-64 slices as one job, two copies of the parameters on each, from nothing to training.
#   ZONE=us-east5-b BUCKET=gs://my-bucket RECORDS=/mnt/my-bucket/records/edits/NAME/1.0.0 \
#     launch/pod/multislice.sh [--dry-run]
# The run goes to BUCKET; RECORDS is where every host finds them, on a bucket that is mounted there.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ -n "${BUCKET:-}" ]] || { echo "multislice.sh: set BUCKET=gs://..." >&2; exit 2; }
[[ -n "${RECORDS:-}" ]] || { echo "multislice.sh: set RECORDS=/mnt/..., a path on every host" >&2; exit 2; }
export NAME="${NAME:-npedit-two}" TYPE="${TYPE:-v6e-64}" VERSION="${VERSION:-v2-alpha-tpuv6e}" SLICES=2
"$here/create.sh" "$@"
"$here/setup.sh" "$@"
# Slices lie along the mesh axis "data"; two slices take twice the batch.
"$here/train.sh" "$@" --config configs/zimage/npedit.py --workdir "$BUCKET/npedit" \
  "--config.data.records=$RECORDS" --config.mesh.data=4 --config.mesh.fsdp=32 \
  --config.batch_size=128
