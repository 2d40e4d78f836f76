#!/usr/bin/env bash
# Runs the tests in a virtual environment that it makes. Arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ensure_venv "$root/requirements.txt" "$root/tests/requirements.txt"
cd "$root"
exec "$venv/bin/python" -m pytest "$@"
