"""Means over the seeds, how much they vary, and differences of pairs."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """A mean and how much the values vary.

    Attributes:
      mean: of the values, nan without values.
      std: sample standard deviation, nan for fewer than two values.
    """

    mean: float
    std: float


def or_nan(value: float | None) -> float:
    """Return the value, nan for None."""
    return math.nan if value is None else value


def spread(values: Iterable[float]) -> Spread:
    """Return the mean and the sample standard deviation of the values."""
    found = list(values)
    return Spread(
        float(np.mean(found)) if found else math.nan,
        float(np.std(found, ddof=1)) if len(found) > 1 else math.nan,
    )


def paired(
    ours: Mapping[int, float], theirs: Mapping[int, float]
) -> tuple[float, float]:
    """Return the mean of ours - theirs and half its 95 % interval (Student's t).

    Args:
      ours: value by seed.
      theirs: value by seed; seeds that only one of the two has are left out.

    Returns:
      (mean, half the interval): nan without a pair, and the second for one pair.
    """
    import scipy.stats

    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    count, (mean, std) = len(differences), spread(differences)
    if count < 2:
        return mean, math.nan
    t = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return mean, float(t * std / math.sqrt(count))
