"""The table over a population's members: for the terminal, and as files."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from adadfq_jax import errors
from adadfq_jax.report import compare
from adadfq_jax.runtime import files

TABLE_FILE = "population.json"
PAGE_FILE = "compare.html"
_WIDTH = 80


class Row(NamedTuple):
    """A member; accuracies in per cent, None where not measured or failed.

    values: of the keys in which members differ. before, last, best: as in
    summary.json. failure: in which step and term its numbers failed, or ''.
    """

    name: str
    values: dict[str, Any]
    before: float | None
    last: float | None
    best: float | None
    best_step: int | None
    failure: str


class Mean(NamedTuple):
    """Over the members that differ in the seed alone, those that failed left out.

    members: their names. std: sample standard deviation, None below two members.
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
    """A row from a member's summary, or from why there is none."""
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


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), std


def means(rows: Sequence[Row]) -> list[Mean]:
    """A mean for all members of the same values but for the seed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.last is not None:
            key = tuple(v for name, v in row.values.items() if name != "seed")
            groups.setdefault(key, []).append(row)
    return [
        Mean(
            {k: v for k, v in group[0].values.items() if k != "seed"},
            [row.name for row in group],
            *_spread([_number(row.last) for row in group]),
            *_spread([_number(row.best) for row in group]),
        )
        for group in groups.values()
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _percent(value: float | None, std: float | None = None) -> str:
    spread = "" if std is None else f" ± {std:.2f}"
    return "-" if value is None else f"{value:.2f}{spread}"


def to_text(rows: Sequence[Row]) -> str:
    """The table for a terminal, at most 80 columns wide."""
    view = rich.table.Table(
        title="Members, top-1 of Q in per cent", box=rich.box.SIMPLE
    )
    view.add_column("", overflow="fold")
    for name in ("before", "last", "best", "at step"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        measured = [_percent(x) for x in (row.before, row.last, row.best)]
        step = "failed" if row.failure else str(row.best_step or "-")
        view.add_row(row.name, *measured, step)
    for mean in means(rows):
        told = ", ".join(f"{key.split('.')[-1]}={v}" for key, v in mean.values.items())
        view.add_row(
            f"mean of {len(mean.members)}{f' ({told})' if told else ''}",
            "",
            _percent(mean.last, mean.last_std),
            _percent(mean.best, mean.best_std),
            "",
        )
    text = io.StringIO()
    rich.console.Console(file=text, width=_WIDTH).print(view)
    lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
    for row in rows:
        if row.failure:
            told = f"{row.name} failed: {row.failure}"
            lines += textwrap.wrap(told, _WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def write(rows: Sequence[Row], folders: Sequence[Path], workdir: Path) -> str:
    """Writes population.json and compare.html; returns the table for a terminal.

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
        told = f"comparison: {page}"
    except Exception as error:  # the members are whole without one
        told = f"WARNING: no comparison: {errors.one_line(error)}"
    return f"{to_text(rows)}\n{told}"
