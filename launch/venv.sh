# shellcheck shell=bash
# Other scripts source this file. `ensure_venv FILE...` makes .venv in the repository
# and installs the requirement files into it; it installs again only when a file has
# changed. The variable PYTHON names the interpreter, which is python3 by default.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

ensure_venv() {
  local stamp
  stamp="$venv/.installed-$(cat "$@" | sha256sum | cut -c1-16)"
  if [[ -f "$stamp" ]]; then
    return
  fi
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=INTERPRETER" >&2
    exit 2
  }
  if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
  fi
  local files=()
  for file in "$@"; do
    files+=(-r "$file")
  done
  echo "installing $* into $venv, which takes a minute or more" >&2
  "$venv/bin/python" -m pip install --quiet "${files[@]}"
  # The package itself, for the command adadfq.
  "$venv/bin/python" -m pip install --quiet --no-deps --editable "$root"
  find "$venv" -maxdepth 1 -name '.installed-*' -delete
  touch "$stamp"
}
