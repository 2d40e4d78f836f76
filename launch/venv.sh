# shellcheck shell=bash
# Sourced by the other scripts: `ensure_venv FILE...` makes .venv in the repository
# and installs the requirement files into it, again only when one of them changed.
# PYTHON names another interpreter than python3.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

ensure_venv() {
  local stamp
  stamp="$venv/.installed-$(cat "$@" | sha256sum | cut -c1-16)"
  if [[ -f "$stamp" ]]; then
    return
  fi
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2
    exit 2
  }
  if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
  fi
  local files=()
  for file in "$@"; do
    files+=(-r "$file")
  done
  echo "installing $* into $venv" >&2
  "$venv/bin/python" -m pip install --quiet "${files[@]}"
  find "$venv" -maxdepth 1 -name '.installed-*' -delete
  touch "$stamp"
}
