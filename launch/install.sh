#!/usr/bin/env bash
# Makes .venv with the tested versions and JAX for this machine.
#
#   launch/install.sh cpu|cuda13|cuda12|tpu [--dry-run]
#
# cuda13 needs an NVIDIA driver of version 580 or newer, cuda12 one of 525 or newer;
# neither needs CUDA on the system. The variable PYTHON names the interpreter, which is
# python3 by default and must be 3.11 or newer.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/venv.sh
source "$here/venv.sh"
# shellcheck source=launch/cli.sh
source "$here/cli.sh"

kind=
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    cpu | cuda13 | cuda12 | tpu) kind=$argument ;;
    *) fail "$argument: one of cpu, cuda13, cuda12, tpu is needed" ;;
  esac
done
[[ -n "$kind" ]] || fail "the kind of JAX is needed: cpu, cuda13, cuda12 or tpu"

if [[ -n "$dry_run" ]]; then
  call "${PYTHON:-python3}" -m venv --clear "$venv"
  call "$venv/bin/python" -m pip install --quiet -r "$root/requirements.txt"
  call "$venv/bin/python" -m pip install --quiet --no-deps --editable "$root"
else
  ensure_venv "$root/requirements.txt"
fi
case "$kind" in
  cpu) exit ;;
  tpu) extra=("jax[tpu]" gcsfs) ;; # gcsfs: a slice's workdir is in a bucket
  *) extra=("jax[$kind]") ;;
esac
# The requirements are given again, since they pin the versions that the extra brings.
call "$venv/bin/python" -m pip install --quiet -r "$root/requirements.txt" "${extra[@]}"
