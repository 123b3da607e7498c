#!/usr/bin/env bash
# Asks the training to save and end, on every host: NAME=.. ZONE=.. launch/pod/stop.sh [--dry-run]
# For a training that nobody watches any longer: Ctrl-C of train.sh leaves the hosts alone.
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[[ $# -eq 0 ]] || fail "unexpected argument '$1'"
on_all_hosts "npedit_jax/launch/pod/host.sh stop"
