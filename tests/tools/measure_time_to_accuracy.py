"""Measures Q's accuracy over the seconds since a command was given.

    PYTHONPATH=. .venv/bin/python tests/tools/measure_time_to_accuracy.py \
        --config=FILE:w3a3 --workdir=FOLDER --recipe=best \
        --recipe='adadfq_tuned eval.between=12' [--limit=600] [--figure=FILE.svg] \
        [--config.KEY=VALUE ...]

Each recipe, with the keys that it sets, is trained twice by the command, first with an
empty compilation cache and then with a filled one. Each run is a process of its own,
which is stopped after `limit` seconds. Arguments that are not the script's own go to
the command. Prints a row for each run:

    first, at   Q's first measured top-1 in per cent, and the seconds until it was known
    last, at    likewise, the last
    P, compile, train, after
                seconds of the phases: until P was measured, until the steps of the game
                were compiled, until Q's file was written, until the command ended

The seconds contain the measuring. The figure has a line for each run; FOLDER keeps the
runs and points.json.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from adadfq_jax.runtime.tables import number

ROOT = Path(__file__).parents[2]
PHASES = ("P", "compile", "train", "after")
HEAD = ("recipe", "cache", "first", "at", "last", "at", *PHASES)
_MEASURED = re.compile(r"step (\d+): Q top-1 ([\d.]+) %")
_MARKS = {"P": "P: ", "compile": "Q: "}  # beginnings of the lines that end a phase


def follow(command: list[str], workdir: Path, cache: Path, limit: float) -> dict:
    """Run the command; return points (seconds, top-1) and the ends of the phases."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    points, ends = [], {}
    stop = threading.Timer(limit, process.send_signal, [signal.SIGINT])
    stop.start()
    assert process.stdout is not None
    for line in process.stdout:
        now = time.monotonic() - begin
        for phase, mark in _MARKS.items():
            if line.startswith(mark):
                ends.setdefault(phase, now)
        if found := _MEASURED.search(line):
            points.append((now, float(found[2])))
    process.wait()
    stop.cancel()
    summary = workdir / "summary.json"
    if summary.exists():
        done = summary.stat().st_mtime - (time.time() - (time.monotonic() - begin))
        points.append((done, json.loads(summary.read_text())["q_last_top1"]))
        ends |= {"train": done, "after": time.monotonic() - begin}
    elif time.monotonic() - begin < limit:
        sys.exit(f"exit code {process.returncode}: {' '.join(command)}")
    return {"points": points, "ends": ends}


def row(recipe: str, cache: str, found: dict[str, Any]) -> str:
    """Return a run's row of the table."""
    cells, earlier = [recipe, cache], 0.0
    points = found["points"] or [(None, None)]
    for seconds, top1 in (points[0], points[-1]):
        cells += [number(top1), number(seconds, 0)]
    for phase in PHASES:
        end = found["ends"].get(phase)
        cells.append(number(end and end - earlier, 0))
        earlier = earlier if end is None else end
    return f"| {' | '.join(cells)} |"


def draw(runs: dict[str, dict], figure: Path, title: str) -> None:
    """Draw top-1 over seconds: a colour for each recipe, dashed with an empty cache."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    axes = pyplot.figure(figsize=(6, 3.6), layout="constrained").subplots()
    recipes = list(dict.fromkeys(name.split()[0] for name in runs))
    for name, found in runs.items():
        recipe, cache = name.split()
        axes.plot(
            *zip(*found["points"], strict=True),
            color=f"C{recipes.index(recipe)}",
            linestyle="--" if cache == "empty" else "-",
            marker="o",
            markersize=3,
            label=f"{recipe}, {cache} cache",
        )
    axes.set(xlabel="seconds since the command", ylabel="top-1, %", title=title)
    axes.legend(fontsize=8)
    pyplot.savefig(figure)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--figure", type=Path)
    given, others = parser.parse_known_args()
    folder = given.workdir.resolve()
    folder.mkdir(parents=True)  # an earlier one's cache would not be empty
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
    runs: dict[str, dict] = {}
    for recipe, *keys in map(str.split, given.recipe):
        for cache in ("empty", "filled"):
            workdir = folder / f"{recipe}-{cache}"
            command = [sys.executable, "-m", "adadfq_jax.main"]
            command += [f"--config={given.config}", f"--config.recipe={recipe}"]
            command += [f"--config.{key}" for key in keys]
            command += [*others, f"--workdir={workdir}"]
            found = follow(command, workdir, folder / f"cache-{recipe}", given.limit)
            runs[f"{recipe} {cache}"] = found
            print(row(recipe, cache, found), flush=True)
            (folder / "points.json").write_text(json.dumps(runs, indent=1))
    if given.figure:
        draw(runs, given.figure, Path(given.config).name)


if __name__ == "__main__":
    main()
