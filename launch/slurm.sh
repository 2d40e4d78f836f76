#!/usr/bin/env bash
# Submits `python -m adadfq_jax.main` to Slurm. The job is requeued until it is done;
# see launch/README.md.
#
#   launch/slurm.sh [FLAG...] -- ARGUMENT...
#
#   --nodes=N           number of nodes; 1 by default   $NODES
#   --gpus=N            GPUs a node; 1 by default       $GPUS
#   --sbatch=OPTION     option of sbatch, as --sbatch=--partition=gpu; repeatable
#   --dry-run           prints the command, executes nothing
#
# ARGUMENTs are those of adadfq_jax.main. --config and --workdir are needed, and the
# workdir must be on a file system that all nodes share. sbatch also reads its own
# variables ($SBATCH_PARTITION, $SBATCH_ACCOUNT, $SBATCH_TIMELIMIT).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
# shellcheck source=launch/cli.sh
source "$here/cli.sh"

nodes=${NODES:-1} gpus=${GPUS:-1}
options=()
while (($#)); do
  case "$1" in
    --) shift && break ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --sbatch=*) options+=("${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    *) fail "$1: no such flag; arguments of adadfq_jax.main come after --" ;;
  esac
  shift
done

for number in "$nodes" "$gpus"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "$number: --nodes or --gpus must be a number"
done
for flag in config workdir; do
  [[ " $*" =~ \ --?${flag}[=\ ] ]] || fail "--$flag is needed after --"
done
if [[ -z "$dry_run" ]]; then
  command -v sbatch > /dev/null || fail "no sbatch: run this on a Slurm machine"
  [[ -x "$root/.venv/bin/python" ]] || fail "no .venv: make it with launch/install.sh"
fi

# Every GPU has a task: under Slurm, JAX gives each task the device of its local rank.
call sbatch --chdir="$root" --nodes="$nodes" --ntasks-per-node="$gpus" \
  --gpus-per-node="$gpus" "${options[@]}" "$here/slurm.sbatch" "$@"
