"""The table of a population's members, for the terminal and as files."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adadfq_jax import errors
from adadfq_jax.report import compare
from adadfq_jax.report.statistics import Spread, or_nan, spread
from adadfq_jax.runtime import files, tables
from adadfq_jax.runtime.tables import number, with_spread

TABLE_FILE = "population.json"
PAGE_FILE = "compare.html"


class Row(NamedTuple):
    """A member; accuracies in per cent, None if not measured or if the member failed.

    Attributes:
      name: of the member.
      values: of the keys in which members differ.
      before: as q_before_top1 in summary.json.
      last: as q_last_top1 in summary.json.
      best: as q_best_top1 in summary.json.
      best_step: as q_best_step in summary.json.
      failure: step and term in which a number was not finite, or ''.
    """

    name: str
    values: dict[str, Any]
    before: float | None
    last: float | None
    best: float | None
    best_step: int | None
    failure: str


class Mean(NamedTuple):
    """Means over members that differ in the seed alone, without those that failed.

    Attributes:
      values: of the keys that all these members share.
      members: names of the members.
      last: mean of their `last`.
      last_std: sample standard deviation, None for one member.
      best: mean of their `best`.
      best_std: sample standard deviation, None for one member.
    """

    values: dict[str, Any]
    members: list[str]
    last: float
    last_std: float | None
    best: float
    best_std: float | None


def make_row(
    name: str, values: dict[str, Any], summary: dict[str, Any] | None, failure: str
) -> Row:
    """Make a row from a member's summary, or from its failure."""
    found = summary or {}
    return Row(
        name,
        values,
        before=found.get("q_before_top1"),
        last=found.get("q_last_top1"),
        best=found.get("q_best_top1"),
        best_step=found.get("q_best_step"),
        failure=failure,
    )


def _json(found: Spread) -> tuple[float, float | None]:
    """Return the mean and the deviation, None for one member, as JSON has no nan."""
    return found.mean, None if math.isnan(found.std) else found.std


def means(rows: Sequence[Row]) -> list[Mean]:
    """Average the members that differ in the seed alone."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.last is not None:
            key = tuple(v for name, v in row.values.items() if name != "seed")
            groups.setdefault(key, []).append(row)
    return [
        Mean(
            {k: v for k, v in group[0].values.items() if k != "seed"},
            [row.name for row in group],
            *_json(spread(or_nan(row.last) for row in group)),
            *_json(spread(or_nan(row.best) for row in group)),
        )
        for group in groups.values()
    ]


def to_text(rows: Sequence[Row]) -> str:
    """Render the table for a terminal, at most 80 columns wide."""
    cells = [
        [
            row.name,
            *(number(value) for value in (row.before, row.last, row.best)),
            "failed" if row.failure else str(row.best_step or "-"),
        ]
        for row in rows
    ]
    for mean in means(rows):
        values = [f"{key.split('.')[-1]}={v}" for key, v in mean.values.items()]
        last = with_spread(mean.last, mean.last_std)
        best = with_spread(mean.best, mean.best_std)
        name = f"mean of {len(mean.members)}"
        name += f" ({', '.join(values)})" if values else ""
        cells.append([name, "", last, best, ""])
    head = ("", "before", "last", "best", "at step")
    lines = [tables.to_text("Members, top-1 of Q in per cent", head, cells)]
    for row in rows:
        if row.failure:
            line = f"{row.name} failed: {row.failure}"
            lines += textwrap.wrap(line, tables.WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def write(rows: Sequence[Row], folders: Sequence[Path], workdir: Path) -> str:
    """Write population.json and compare.html; return the table for a terminal.

    Args:
      rows: of all members.
      folders: of the members.
      workdir: of the population.
    """
    content = {
        "members": [row._asdict() for row in rows],
        "means": [mean._asdict() for mean in means(rows)],
    }
    files.write_json(workdir / TABLE_FILE, content)
    page = workdir / PAGE_FILE
    try:
        compare.write(folders, page)
        line = f"comparison: {page}"
    except Exception as error:  # the members are complete without a comparison
        line = f"WARNING: no comparison: {errors.one_line(error)}"
    return f"{to_text(rows)}\n{line}"
