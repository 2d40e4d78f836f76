"""Means of the steps' metrics over a logging interval, and the log file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from adadfq_jax import game
from adadfq_jax.errors import InputError, NumericalError
from adadfq_jax.runtime import files, sharding

H_NAMES = tuple(
    {0.0: "h_min", 1.0: "h_max"}.get(q, f"h_q{round(100 * q)}")
    for q in game.H_QUANTILES
)


def interval_means(
    dispatches: Sequence[tuple[int, dict[str, Array]]], begin: int
) -> dict[str, float]:
    """Fetch the metrics of an interval at once, and average them over its steps.

    Args:
      dispatches: (number of steps, metrics averaged over them), in order.
      begin: number of steps before the interval.

    Returns:
      The means by name; the quantiles of H' have the names `H_NAMES`.

    Raises:
      NumericalError: a metric, or the update of a step, is not finite.
    """
    fetched = sharding.fetch([metrics for _, metrics in dispatches])
    counts = [count for count, _ in dispatches]
    first_bad = int(fetched[-1]["first_bad_step"])
    if first_bad >= 0:
        ends = begin + np.cumsum(counts)
        where = int(np.searchsorted(ends, first_bad, "right"))
        raise NumericalError(_describe(fetched[where], first_bad + 1))
    means = {
        name: np.average([np.float64(m[name]) for m in fetched], 0, counts)
        for name in fetched[0]
        if name != "first_bad_step"
    }
    if "h_quantiles" in means:
        quantiles = means.pop("h_quantiles")
        means.update(zip(H_NAMES, np.ravel(quantiles), strict=True))
    return {name: float(value) for name, value in means.items()}


def _describe(metrics: dict[str, np.ndarray], step: int) -> str:
    """Return a sentence on a non-finite step, counted from 1 as in the log."""
    terms = [name for name, value in metrics.items() if not np.all(np.isfinite(value))]
    what = ", ".join(sorted(terms)) if terms else "the updated weights"
    rates = "game.g_rate, game.q_rate"
    if "generator" not in metrics:
        rates = "reconstruction.rate, reconstruction.factor_rate"
    return f"step {step}: not finite: {what}. Lower rates may help ({rates})"


class MetricsLog:
    """A file of one JSON object per logging interval, in the order of the steps.

    The file is opened for each row, so that its removal is noticed.

    Args:
      path: the file.
      begin: the step from which the run resumes; rows of later steps are dropped.
    """

    def __init__(self, path: Path, begin: int = 0):
        self._path = path
        lines = _lines(path) if path.exists() else []
        kept = [line for line in lines if _is_up_to(line, begin)]
        files.write_text(path, "".join(kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and write it to the file at once.

        Raises:
          InputError: the file is gone or cannot be written.
        """
        try:
            with self._path.open("r+") as file:
                file.seek(0, 2)
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(
                f"{self._path}: the log cannot be written ({error.strerror});"
                " if the folder is still there, start again to resume"
            ) from error


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines(keepends=True)


def _is_up_to(line: str, step: int) -> bool:
    """Tell whether a line is a complete row of this step or an earlier one."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # the line is incomplete
