#!/usr/bin/env bash
# The training on one host, as train.sh and stop.sh start it there, from the checkout that setup.sh made:
#   launch/pod/host.sh train [arguments of npedit_jax.train]
#   launch/pod/host.sh stop
# A host that is taken away gets SIGTERM and a hangup, all its processes at once: the training then saves and ends, and
# everything else waits for it. It goes on where the connection is lost that it was started over; `stop`, or another
# `train`, makes it save and end. Output goes to train.log in the home directory too.
#
# Set in the environment: MOUNT, a bucket to find under /mnt (Cloud Storage FUSE; setup.sh sees to what it needs), whose
# weights/ and records/ the checkout then has as its own, where the configs look for them; STOP_SECONDS, which a training
# has to save and end (default 300).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
noted="$HOME/train.pid"

# The process id of the training that runs here, if one does. Another process may have got the number since.
running() {
  local process
  process="$(cat "$noted" 2>/dev/null)" || return 1
  [[ -r "/proc/$process/cmdline" && "$(tr '\0' ' ' <"/proc/$process/cmdline")" == *npedit_jax.train* ]] || return 1
  printf '%s' "$process"
}

stop() {
  local process waited
  process="$(running)" || return 0
  printf 'host.sh: the training that runs on %s saves and ends\n' "$(hostname)" >&2
  kill -TERM "$process" 2>/dev/null || true
  for ((waited = 0; waited < ${STOP_SECONDS:-300}; waited++)); do
    running >/dev/null || return 0
    sleep 1
  done
  kill -KILL "$process" 2>/dev/null || true
}

# A host that was started anew has lost its mounts.
mount_bucket() {
  local name
  mountpoint -q "/mnt/$MOUNT" || gcsfuse --implicit-dirs "$MOUNT" "/mnt/$MOUNT"
  for name in weights records; do
    if [[ -L "$name" || ! -e "$name" ]]; then ln -sfn "/mnt/$MOUNT/$name" "$name"; fi
  done
}

train() {
  local child="" status=0
  stop
  [[ -z "${MOUNT:-}" ]] || mount_bucket
  trap '' HUP
  trap '[[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
  .venv/bin/python -m npedit_jax.train "$@" > >(
    trap '' TERM INT
    exec tee -p -a "$HOME/train.log"
  ) 2>&1 &
  child="$!"
  printf '%s\n' "$child" >"$noted"
  # A signal interrupts `wait`, which then has not seen the end.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true
  done
  wait "$child" || status="$?"
  rm -f "$noted"
  return "$status"
}

case "${1:-}" in
  train | stop) "$@" ;;
  *)
    printf 'host.sh: expected train or stop, found %q\n' "${1:-}" >&2
    exit 2
    ;;
esac
