"""The table of a comparison, as Markdown, CSV and a plot."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adadfq_jax import config as base
from adadfq_jax import settings
from adadfq_jax.runtime import files

CONFIDENCE = 0.95


class Arm(NamedTuple):
    """One of the things compared: a name and the configuration keys that it sets."""

    name: str
    overrides: dict[str, Any]


class Cell(NamedTuple):
    """One run of the grid. bits: 'wKaK'."""

    arm: Arm
    bits: str
    seed: int

    @property
    def folder(self) -> str:
        """Its workdir below that of the comparison."""
        return f"{self.bits}/{self.arm.name}/seed-{self.seed}"


class Result(NamedTuple):
    """What a run came to; accuracies in per cent.

    curve: (step, seconds of training until then, top-1 of Q), in the order of steps;
    empty where the run failed. failure: why it did, or ''. first_last_bits, places: the
    run's, see `settings.Quant`.
    """

    cell: Cell
    p: float
    before: float
    curve: tuple[tuple[int, float, float], ...]
    failure: str = ""
    first_last_bits: int = 0
    places: str = "nonlinearities"

    @property
    def setting(self) -> str:
        """What the bits are called; results of one setting alone are compared."""
        weight_bits, act_bits, _ = base.parse_argument(self.cell.bits, "")
        return settings.bits_label(
            weight_bits, act_bits, self.first_last_bits, self.places
        )

    @property
    def last(self) -> float:
        """Of the exported file."""
        return self.curve[-1][2]

    @property
    def best(self) -> float:
        """Best-on-test over the evaluations after Q began to train."""
        return max(top1 for _, _, top1 in self.curve)

    @property
    def seconds(self) -> float:
        """Of all steps; without compilation and evaluation."""
        return self.curve[-1][1]

    def at(self, seconds: float) -> float:
        """Top-1 at the last evaluation within so many seconds of training."""
        within = [top1 for _, at, top1 in self.curve if at <= seconds * (1 + 1e-9)]
        return within[-1] if within else self.before


class Row(NamedTuple):
    """An arm at some bits: means over its seeds, accuracies in per cent.

    runs: seeds, without those that failed. steps: of a run. spread: sample standard
    deviation of the last, nan for one run. difference: mean over the seeds of (last -
    the baseline's last), nan for the baseline; half_width: of its 95 % interval
    (Student's t), nan below two pairs. at_equal_seconds: last evaluation within the
    baseline's mean time.
    """

    bits: str
    arm: str
    runs: int
    steps: int
    before: float
    last: float
    spread: float
    best: float
    difference: float
    half_width: float
    seconds: float
    at_equal_seconds: float


COLUMNS = {
    "bits": "bits",
    "arm": "arm",
    "runs": "seeds",
    "steps": "steps",
    "before": "before",
    "last": "last",
    "spread": "std",
    "best": "best",
    "difference": "last - baseline",
    "half_width": "± 95 %",
    "seconds": "training s",
    "at_equal_seconds": "at equal s",
}


def paired(ours: Sequence[Result], theirs: Sequence[Result]) -> tuple[float, float]:
    """Mean of the differences of `last` by seed, and half its 95 % interval."""
    import scipy.stats

    by_seed = {result.cell.seed: result.last for result in theirs}
    differences = [
        result.last - by_seed[result.cell.seed]
        for result in ours
        if result.cell.seed in by_seed
    ]
    count = len(differences)
    if count < 2:
        return (differences[0] if differences else math.nan), math.nan
    t = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    width = t * np.std(differences, ddof=1) / math.sqrt(count)
    return float(np.mean(differences)), float(width)


def tabulate(all_results: Sequence[Result]) -> list[Row]:
    """Rows by setting, the arms in their order; the first arm is the baseline.

    Arms with other bits in the first and last layer are another setting, which has a
    baseline of its own: it is never compared with the others.
    """
    rows = []
    results = [result for result in all_results if not result.failure]
    for setting in dict.fromkeys(result.setting for result in results):
        of_setting = [result for result in results if result.setting == setting]
        arms: dict[str, list[Result]] = {}
        for result in of_setting:
            arms.setdefault(result.cell.arm.name, []).append(result)
        # The first that was asked for; where it failed nothing can be compared.
        first = next(r.cell.arm.name for r in all_results if r.setting == setting)
        baseline = arms.get(first, [])
        budget = float(np.mean([r.seconds for r in baseline])) if baseline else math.nan
        for name, found in arms.items():
            lasts = [result.last for result in found]
            difference = (math.nan, math.nan)
            if found is not baseline:
                difference = paired(found, baseline)
            rows.append(
                Row(
                    bits=setting,
                    arm=name,
                    runs=len(found),
                    steps=found[0].curve[-1][0],
                    before=float(np.mean([r.before for r in found])),
                    last=float(np.mean(lasts)),
                    spread=float(np.std(lasts, ddof=1)) if len(lasts) > 1 else math.nan,
                    best=float(np.mean([r.best for r in found])),
                    difference=difference[0],
                    half_width=difference[1],
                    seconds=float(np.mean([r.seconds for r in found])),
                    at_equal_seconds=float(np.mean([r.at(budget) for r in found]))
                    if baseline
                    else math.nan,
                )
            )
    return rows


def _text(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    sign = "+" if name == "difference" else ""
    return f"{value:{sign}.{0 if name == 'seconds' else 2}f}"


def to_markdown(rows: Sequence[Row]) -> str:
    """The table; `last` is the headline, `best` is best-on-test and optimistic."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [_text(name, getattr(row, name)) for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def unequal_steps(rows: Sequence[Row]) -> str:
    """A sentence where arms of a setting play different numbers of steps."""
    settings = dict.fromkeys(row.bits for row in rows)
    found = [s for s in settings if len({r.steps for r in rows if r.bits == s}) > 1]
    if not found:
        return ""
    return (
        f"\n{', '.join(found)}: the arms differ in steps, so that 'last - baseline' is"
        " not at equal cost (--set='game.steps=...' makes them equal).\n"
    )


def failures(results: Sequence[Result]) -> str:
    """A line per run that failed, which is in no mean."""
    lines = [
        f"- {result.cell.folder} failed: {result.failure}\n"
        for result in results
        if result.failure
    ]
    return "\n" + "".join(lines) if lines else ""


def to_csv(results: Sequence[Result]) -> str:
    """A line per evaluation of every run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["bits", "arm", "seed", "step", "seconds", "q_top1", "p_top1"])
    for result in results:
        cell = result.cell
        head = [result.setting.lower(), cell.arm.name, cell.seed]
        curve = [(0, 0.0, result.before), *result.curve] if result.curve else []
        for step, seconds, top1 in curve:
            writer.writerow([*head, step, round(seconds, 2), top1, result.p])
    return text.getvalue()


def plot(all_results: Sequence[Result], path: Path) -> None:
    """A dot for the last of every run and a bar for the mean, by arm and setting."""
    results = [result for result in all_results if not result.failure]
    if not results:  # nothing to draw yet: every run so far failed
        path.unlink(missing_ok=True)
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings = list(dict.fromkeys(result.setting for result in results))
    arms = list(dict.fromkeys(result.cell.arm.name for result in results))
    figure, axes = pyplot.subplots(
        1,
        len(settings),
        figsize=(1.5 + 3.5 * len(settings), 1.2 + 0.35 * len(arms)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        for height, arm in enumerate(arms):
            lasts = [
                r.last
                for r in results
                if (r.setting, r.cell.arm.name) == (setting, arm)
            ]
            axis.plot(lasts, [height] * len(lasts), "o", color="#0072b2", alpha=0.6)
            if lasts:
                axis.plot(np.mean(lasts), height, "|", color="black", markersize=18)
        axis.set(title=setting, xlabel="top-1 of the last, %")
        axis.set_yticks(range(len(arms)), arms)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    files.write_stream(path, lambda file: figure.savefig(file, format="png", dpi=150))
    pyplot.close(figure)


def write(results: Sequence[Result], folder: Path) -> str:
    """Writes table.md, runs.csv and plot.png; returns the table."""
    rows = tabulate(results)
    table = to_markdown(rows) + unequal_steps(rows) + failures(results)
    files.write_text(folder / "table.md", table)
    files.write_text(folder / "runs.csv", to_csv(results))
    plot(results, folder / "plot.png")
    return table
