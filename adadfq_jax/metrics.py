"""Means of device metrics over a logging interval, and the log file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from adadfq_jax import game

H_NAMES = tuple(
    {0.0: "h_min", 1.0: "h_max"}.get(q, f"h_q{round(100 * q)}")
    for q in game.H_QUANTILES
)


def interval_means(steps: Sequence[dict[str, Array]]) -> dict[str, float]:
    """Fetches the metrics of several steps at once and averages them.

    The one place where training waits for the device.
    """
    fetched = jax.device_get(list(steps))
    means = {
        name: np.asarray([step[name] for step in fetched], np.float64).mean(0)
        for name in fetched[0]
    }
    quantiles = means.pop("h_quantiles")
    means.update(zip(H_NAMES, np.ravel(quantiles), strict=True))
    return {name: float(value) for name, value in means.items()}


class MetricsLog:
    """A file of one JSON object per logging interval."""

    def __init__(self, path: Path):
        self._file = path.open("w")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, at once on disk."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
