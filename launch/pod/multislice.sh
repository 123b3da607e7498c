#!/usr/bin/env bash
# Example: two v6e-64 slices as one job, two copies of the parameters on each, from nothing to training.
#   ZONE=us-east5-b BUCKET=gs://my-bucket RECORDS=records/edits/NAME/1.0.0 launch/pod/multislice.sh [--dry-run]
# The run goes to BUCKET, which has weights/ and records/ as well; RECORDS is the path of those to train on.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ "${BUCKET:-}" =~ ^gs://[^/]+$ ]] || { echo "multislice.sh: set BUCKET=gs://NAME, found '${BUCKET:-}'" >&2; exit 2; }
[[ -n "${RECORDS:-}" ]] || { echo "multislice.sh: set RECORDS=records/..., a path on the bucket" >&2; exit 2; }
export MOUNT="${BUCKET#gs://}"
export NAME="${NAME:-npedit-two}" TYPE="${TYPE:-v6e-64}" VERSION="${VERSION:-v2-alpha-tpuv6e}" SLICES=2
"$here/create.sh" "$@"
"$here/setup.sh" "$@"
# Slices lie along the mesh axis "data"; two slices take twice the batch.
"$here/train.sh" "$@" --config configs/zimage/npedit.py --workdir "$BUCKET/npedit" \
  "--config.data.records=$RECORDS" --config.mesh.data=4 --config.mesh.fsdp=32 --config.batch_size=128 \
  --config.networks.student.options.remat=attention --config.networks.fake_score.options.remat=dots_attention
