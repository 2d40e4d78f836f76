#!/usr/bin/env bash
# Runs the tests in a virtual environment that this script makes. --unit runs only the
# tests that start no process. Other arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
given=()
for argument in "$@"; do
  if [[ "$argument" == --unit ]]; then
    given=(tests/unit "${given[@]}")
  else
    given+=("$argument")
  fi
done
ensure_venv "$root/requirements.txt" "$root/tests/requirements.txt"
cd "$root"
exec "$venv/bin/python" -m pytest "${given[@]}"
