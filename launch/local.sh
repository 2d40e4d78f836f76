#!/usr/bin/env bash
# Runs `python -m adadfq_jax.main` on this machine, in a virtual environment that this
# script makes. Arguments are passed on; --config and --workdir have defaults.
# --dry-run prints the command and does nothing else.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/venv.sh
source "$here/venv.sh"
# shellcheck source=launch/cli.sh
source "$here/cli.sh"

given=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=1 ;;
    *) given+=("$argument") ;;
  esac
done
set -- "${given[@]}"

config="$root/configs/fashion_mnist_resnet20.py:w4a4"
workdir=
has_config=
previous=
for argument in "$@"; do
  case "$previous" in
    --config | -config) config=$argument ;;
  esac
  case "$argument" in
    --config=* | -config=*) has_config=1 config=${argument#*=} ;;
    --config | -config) has_config=1 ;;
    --workdir | -workdir | --workdir=* | -workdir=*) workdir=given ;;
  esac
  previous=$argument
done

# Defaults come first: an override like --config.seed=1 must come after its --config.
arguments=("$@")
if [[ -z "$workdir" ]]; then
  name=$(basename "$config" | sed 's/\.py//; s/[:,]/-/g')
  arguments=("--workdir=$root/runs/$name" "${arguments[@]}")
fi
if [[ -z "$has_config" ]]; then
  arguments=("--config=$config" "${arguments[@]}")
fi
command=(env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
command+=("$venv/bin/python" -m adadfq_jax.main "${arguments[@]}")
if [[ -n "$dry_run" ]]; then
  quoted "${command[@]}"
  exit
fi
ensure_venv "$root/requirements.txt"
exec "${command[@]}" 3>&-
