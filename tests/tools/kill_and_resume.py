"""Kills a short run at random moments and shows that it always ends in the same file.

    PYTHONPATH=. .venv/bin/python tests/tools/kill_and_resume.py

Plays a game once undisturbed. Then, for each kill: starts the same game in a new
workdir, sends SIGKILL, every other time while a checkpoint is being written, repeats
the command, and compares `quantized.safetensors` byte by byte and the steps of
`metrics.jsonl`. Arguments that are not the script's own go to `adadfq_jax.main`, as in
--config=FILE or --config.game.steps=60. Exit code 0 if every run ended as the first.
"""

import argparse
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GAME = [
    "--config=configs/fashion_mnist_resnet20.py:w4a4",
    "--config.eval.enabled=False",
    "--config.game.steps=24",
    "--config.game.observe_steps=3",
    "--config.game.warmup_steps=6",
    "--config.reconstruction.iterations=4",
    "--config.reconstruction.images=64",
    "--config.log.every=5",
    "--config.checkpoint.every=2",
]
PATIENCE = 600  # seconds for one run


def start(workdir: Path, arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "adadfq_jax.main"),
            *arguments,
            f"--workdir={workdir}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def complete(workdir: Path, arguments: list[str]) -> str:
    """Runs to the end and returns what was said."""
    process = start(workdir, arguments)
    said, _ = process.communicate(timeout=PATIENCE)
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode}\n{said}")
    return said


def result(workdir: Path) -> tuple[bytes, list[int]]:
    """The exported file and the steps of the log."""
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    return (workdir / "quantized.safetensors").read_bytes(), steps


def is_saving(workdir: Path) -> bool:
    """Whether a checkpoint is begun and its digest not yet written."""
    folders = [p for p in (workdir / "checkpoints").glob("*") if p.is_dir()]
    return any(not (p / "digest.sha256").exists() for p in folders)


def kill(process: subprocess.Popen, workdir: Path, delay: float, in_save: bool) -> str:
    """Sends SIGKILL `delay` seconds after the start, or in the first save after it."""
    end = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    while in_save and process.poll() is None and not is_saving(workdir):
        time.sleep(0.0002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        return "after its end"
    return "in a save" if is_saving(workdir) else f"after {delay:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args, others = parser.parse_known_args()
    own_config = any(a.startswith("--config=") for a in others)
    arguments = others if own_config else GAME + others
    moments = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as folder:
        complete(Path(folder) / "warm", arguments)  # fills the compilation cache
        began = time.monotonic()
        complete(Path(folder) / "whole", arguments)
        seconds = time.monotonic() - began
        whole = result(Path(folder) / "whole")
        print(f"undisturbed: {seconds:.1f} s, {len(whole[0]):,} bytes", flush=True)
        killed = saves = same = 0
        for attempt in itertools.count():
            if killed == args.kills:
                break
            workdir = Path(folder) / f"attempt{attempt}"
            process = start(workdir, arguments)
            moment = kill(
                process, workdir, moments.uniform(0, seconds), killed % 2 == 1
            )
            if moment == "after its end":
                continue
            killed, saves = killed + 1, saves + (moment == "in a save")
            said = complete(workdir, arguments)
            resumed = [line for line in said.splitlines() if "resuming" in line]
            equal = result(workdir) == whole
            same += equal
            verdict = "same bytes" if equal else "DIFFERENT"
            told = resumed[0] if resumed else "from the start"
            print(f"kill {killed} {moment}: {told}: {verdict}", flush=True)
    print(f"{killed} kills, {saves} of them in a save: {same} ended in the same bytes")
    sys.exit(same != killed)


if __name__ == "__main__":
    main()
