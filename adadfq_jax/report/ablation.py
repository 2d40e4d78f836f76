"""The table of a comparison, as Markdown, CSV and a plot."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adadfq_jax import config as base
from adadfq_jax import settings
from adadfq_jax.report.statistics import paired, spread
from adadfq_jax.runtime import files, tables


class Arm(NamedTuple):
    """One arm of a comparison.

    Attributes:
      name: of the arm.
      overrides: the configuration keys that it sets.
    """

    name: str
    overrides: dict[str, Any]


class Cell(NamedTuple):
    """One run of the grid.

    Attributes:
      arm: the run's arm.
      bits: 'wKaK'.
      seed: of the run.
    """

    arm: Arm
    bits: str
    seed: int

    @property
    def folder(self) -> str:
        """The run's workdir, relative to the comparison's workdir."""
        return f"{self.bits}/{self.arm.name}/seed-{self.seed}"


class Result(NamedTuple):
    """The result of a run; accuracies in per cent.

    Attributes:
      cell: the run's place in the grid.
      p: top-1 of P.
      before: top-1 of Q before it trains.
      curve: (step, seconds of training so far, top-1 of Q), in the order of steps;
        empty where the run failed.
      failure: why the run failed, or ''.
      first_last_bits: see `settings.Quant`.
      places: see `settings.Quant`.
      layer_bits: true where layers have bits of their own.
    """

    cell: Cell
    p: float
    before: float
    curve: tuple[tuple[int, float, float], ...]
    failure: str = ""
    first_last_bits: int = 0
    places: str = "nonlinearities"
    layer_bits: Any = False

    @property
    def setting(self) -> str:
        """The label of the bits; only results with the same label are compared."""
        weight_bits, act_bits, _ = base.parse_argument(self.cell.bits, "")
        return settings.bits_label(
            *(weight_bits, act_bits, self.first_last_bits, self.places),
            self.layer_bits,
        )

    @property
    def last(self) -> float:
        """Top-1 of the exported file."""
        return self.curve[-1][2]

    @property
    def best(self) -> float:
        """Best top-1 after Q began to train, chosen on the test set."""
        return max(top1 for _, _, top1 in self.curve)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without compilation and evaluation."""
        return self.curve[-1][1]

    def at(self, seconds: float) -> float:
        """Return top-1 at the last evaluation within so many seconds of training."""
        within = [top1 for _, at, top1 in self.curve if at <= seconds * (1 + 1e-9)]
        return within[-1] if within else self.before


class Row(NamedTuple):
    """An arm with one setting of bits: means over its seeds, accuracies in per cent.

    Attributes:
      bits: label of the setting.
      arm: name of the arm.
      runs: number of seeds whose runs did not fail.
      steps: of a run.
      before: top-1 of Q before it trains.
      last: top-1 of the exported file.
      spread: sample standard deviation of `last`, nan for one run.
      best: see `Result.best`.
      difference: mean over the seeds of (last - the baseline's last), nan for the
        baseline.
      half_width: half the 95 % interval of `difference` (Student's t), nan for fewer
        than two pairs.
      seconds: of training.
      at_equal_seconds: top-1 at the last evaluation within the baseline's mean time.
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


def _by_seed(results: Sequence[Result]) -> dict[int, float]:
    return {result.cell.seed: result.last for result in results}


def tabulate(all_results: Sequence[Result]) -> list[Row]:
    """Make the rows, by setting and then by arm; the first arm is the baseline.

    Arms with other bits in the first and last layer are another setting, which has its
    own baseline and is never compared with other settings.
    """
    rows = []
    results = [result for result in all_results if not result.failure]
    for setting in dict.fromkeys(result.setting for result in results):
        of_setting = [result for result in results if result.setting == setting]
        arms: dict[str, list[Result]] = {}
        for result in of_setting:
            arms.setdefault(result.cell.arm.name, []).append(result)
        # The first arm is the baseline; where it failed, nothing can be compared.
        first = next(r.cell.arm.name for r in all_results if r.setting == setting)
        baseline = arms.get(first, [])
        budget = spread(r.seconds for r in baseline).mean
        for name, found in arms.items():
            last = spread(result.last for result in found)
            difference = (math.nan, math.nan)
            if found is not baseline:
                difference = paired(_by_seed(found), _by_seed(baseline))
            rows.append(
                Row(
                    bits=setting,
                    arm=name,
                    runs=len(found),
                    steps=found[0].curve[-1][0],
                    before=spread(r.before for r in found).mean,
                    last=last.mean,
                    spread=last.std,
                    best=spread(r.best for r in found).mean,
                    difference=difference[0],
                    half_width=difference[1],
                    seconds=spread(r.seconds for r in found).mean,
                    at_equal_seconds=spread(
                        r.at(budget) for r in found if baseline
                    ).mean,
                )
            )
    return rows


def _text(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    sign = "+" if name == "difference" else ""
    return tables.number(value, 0 if name == "seconds" else 2, sign)


def to_markdown(rows: Sequence[Row]) -> str:
    """Write the rows as a Markdown table.

    `last` is the headline; `best` is chosen on the test set and optimistic.
    """
    cells = ([_text(name, getattr(row, name)) for name in COLUMNS] for row in rows)
    return tables.to_markdown(list(COLUMNS.values()), cells)


def unequal_steps(rows: Sequence[Row]) -> str:
    """Return a sentence on settings whose arms differ in steps, or ''."""
    settings = dict.fromkeys(row.bits for row in rows)
    found = [s for s in settings if len({r.steps for r in rows if r.bits == s}) > 1]
    if not found:
        return ""
    return (
        f"\n{', '.join(found)}: the arms differ in steps, so that 'last - baseline' is"
        " not at equal cost (--set='game.steps=...' makes the steps equal).\n"
    )


def failures(results: Sequence[Result]) -> str:
    """List the runs that failed, a line each; they are in no mean."""
    lines = [
        f"- {result.cell.folder} failed: {result.failure}\n"
        for result in results
        if result.failure
    ]
    return "\n" + "".join(lines) if lines else ""


def to_csv(results: Sequence[Result]) -> str:
    """Write all evaluations of all runs as CSV, a line each."""
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
    """Draw `last`, a dot for each run and a bar for the mean, by arm and setting."""
    results = [result for result in all_results if not result.failure]
    if not results:  # every run so far failed
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
                axis.plot(spread(lasts).mean, height, "|", color="black", markersize=18)
        axis.set(title=setting, xlabel="last top-1, %")
        axis.set_yticks(range(len(arms)), arms)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    files.write_stream(path, lambda file: figure.savefig(file, format="png", dpi=150))
    pyplot.close(figure)


def write(results: Sequence[Result], folder: Path) -> str:
    """Write table.md, runs.csv and plot.png; return the table."""
    rows = tabulate(results)
    table = to_markdown(rows) + unequal_steps(rows) + failures(results)
    files.write_text(folder / "table.md", table)
    files.write_text(folder / "runs.csv", to_csv(results))
    plot(results, folder / "plot.png")
    return table
