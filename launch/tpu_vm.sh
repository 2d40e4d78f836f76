#!/usr/bin/env bash
# Runs on every VM of a Cloud TPU slice; launch/tpu.sh calls it there.
#
#   tpu_vm.sh setup          installs JAX, and Python where the system's is too old
#   tpu_vm.sh run ARG...     runs adadfq_jax.main and ends with its exit code; where a
#                            game is running already, its log is followed instead
#   tpu_vm.sh stop           makes the game save and stop, and waits for that
#
# The game runs in its own session, so that a broken connection does not end it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/cli.sh
source "$here/cli.sh"
cd "$here/.."
job=.job # holds command, pid, log, code, and the lock that a running game holds
mkdir -p "$job"

setup() {
  if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    PYTHON=python3
  else # TPU images are Ubuntu 22.04, which has Python 3.10
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.11
    PYTHON=$(python3 -m uv python find 3.11)
  fi
  PYTHON=$PYTHON ./launch/install.sh tpu
}

play() {
  local code=0
  # Without its TPU, JAX must fail: it would otherwise run on the CPU for days.
  set -m # gives the game its own process group, see stop
  JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} ./launch/local.sh "$@" &
  echo $! > "$job/pid"
  wait $! || code=$?
  echo "$code" > "$job/code"
}

run() {
  local code
  exec 9> "$job/lock"
  if flock --nonblock 9; then
    rm -f "$job/code" "$job/pid"
    quoted "$@" > "$job/command"
    : > "$job/log"
    set -m # without it, background processes ignore Ctrl-C, see stop
    setsid "$here/tpu_vm.sh" play "$@" < /dev/null >> "$job/log" 2>&1 3>&- &
    set +m
  elif [[ "$(quoted "$@")" != "$(cat "$job/command")" ]]; then
    fail "another game is going on here; stop ends it"
  fi
  exec 9>&- # the game alone holds the lock now
  flock "$job/lock" true &
  tail --lines=100 --follow --pid=$! --sleep-interval=0.2 "$job/log"
  code=$(cat "$job/code" 2> /dev/null) || code=1
  exit "$code"
}

stop() {
  local pid
  # A game cannot be signalled just after it took the lock, before it wrote its pid, and
  # just after it ended, before it released the lock. Both last a moment only.
  for _ in {1..50}; do
    if flock --nonblock "$job/lock" true; then
      echo "nothing is playing"
      return
    fi
    pid=$(cat "$job/pid" 2> /dev/null) || pid=
    # SIGINT, as by Ctrl-C: a game that ends by SIGTERM, as in a preemption, is resumed.
    if [[ -n "$pid" ]] && kill -INT -- "-$pid" 2> /dev/null; then
      flock "$job/lock" true
      return
    fi
    sleep 0.1
  done
  echo "no process to stop: the game is beginning or ending; try again"
}

case "${1:-}" in
  setup | run | play | stop) "$@" ;;
  *) usage >&2 && exit 2 ;;
esac
