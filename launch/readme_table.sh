#!/usr/bin/env bash
# Plays the games of the README's results table, about an hour on 2 cores, and prints
# the table. Finished runs in the folder (default: runs/readme) are not repeated.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
runs=${1:-$root/runs/readme}

play() { # play NAME BITS SEED [override...]
  local workdir="$runs/$1-$2-seed$3"
  if [[ ! -f "$workdir/summary.json" ]]; then
    "$root/launch/local.sh" --config="$root/configs/fashion_mnist_resnet20.py:$2" \
      --config.recipe=adadfq_short --workdir="$workdir" --config.seed="$3" "${@:4}" >&2
  fi
}

for seed in 0 1 2; do
  for bits in w3a3 w4a4; do
    play game "$bits" "$seed"
  done
done
for bits in w3a3 w4a4; do
  play frozen_g "$bits" 0 --config.game.g_rate=0
done
for bits in w3a3 w4a4; do
  play frozen_q "$bits" 0 --config.game.q_rate=0
done

"$venv/bin/python" - "$runs" <<'EOF'
import json, pathlib, sys

print("| run | seed | P | Q before | Q last | Q best | R | steps | seconds |")
print("|---|---|---|---|---|---|---|---|---|")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/summary.json")):
    s = json.loads(path.read_text())
    tops = [s[f"{k}_top1"] for k in ("p", "q_before", "q_last", "q_best")]
    cells = [path.parent.name.rsplit("-seed", 1)[0], str(s["seed"])]
    cells += [f"{t:.2f}" for t in tops] + [f"{s['recovered']:.2f}"]
    cells += [str(s["steps"]), f"{s['seconds']:.0f}"]
    print("| " + " | ".join(cells) + " |")
EOF
