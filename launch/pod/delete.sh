#!/usr/bin/env bash
# Gives the chips back, with all that was on their hosts' disks: NAME=.. ZONE=.. launch/pod/delete.sh [--dry-run]
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[[ $# -eq 0 ]] || fail "unexpected argument '$1'"
run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
