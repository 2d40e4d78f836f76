"""Comparison of several runs: accuracies, means, and the keys in which they differ."""

import itertools
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from adadfq_jax import settings
from adadfq_jax.errors import InputError
from adadfq_jax.report import drawing, gather, page
from adadfq_jax.report.drawing import COLORS, CYCLE, INK, Figure, canvas
from adadfq_jax.report.gather import Run
from adadfq_jax.report.statistics import Spread, or_nan, spread
from adadfq_jax.runtime import files, invocation, tables
from adadfq_jax.runtime.remote import is_remote
from adadfq_jax.runtime.tables import number, with_spread
from adadfq_jax.training import results

COLUMNS = ("run", "bits", "seed", "step", "P", "before", "last", "best", "R")
GROUP_COLUMNS = ("group", "bits", "runs", "before", "last", "std", "best", "R")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 7 and 6 colours make 42 pairs
_LEGEND_MOST = 10  # groups; a longer legend would be larger than its plot


class Entry(NamedTuple):
    """A run of a comparison; accuracies in per cent, nan where there is none.

    Attributes:
      label: distinguishes the run from the others.
      run: the run.
      p: top-1 of P.
      before: top-1 of Q before it trained.
      last: top-1 of Q's file, or of the latest evaluation if the run is not finished.
      best: best top-1 of Q while it trained, chosen on the test set.
      recovered: see `results.recovered`.
    """

    label: str
    run: Run
    p: float
    before: float
    last: float
    best: float
    recovered: float


class Group(NamedTuple):
    """Runs that differ only in their seeds; figures are for finished runs alone.

    Attributes:
      label: the keys that distinguish the group from the other groups.
      entries: the runs.
    """

    label: str
    entries: list[Entry]

    @property
    def finished(self) -> list[Entry]:
        """The runs that are finished."""
        return [entry for entry in self.entries if entry.run.summary]

    def spread(self, name: str) -> Spread:
        """Return mean and standard deviation of a number over the finished runs."""
        return spread(getattr(entry, name) for entry in self.finished)


def make_entry(label: str, run: Run) -> Entry:
    """Make the entry of a run, finished or not."""
    warmup = run.config["game.warmup_steps"]
    trained = [top1 for step, top1 in run.evaluations if step > warmup]
    last = run.evaluations[-1][1] if run.evaluations else None
    return Entry(
        label=label,
        run=run,
        p=or_nan(run.p_top1),
        before=or_nan(run.before),
        last=or_nan(last),
        best=max(trained, default=math.nan),
        recovered=or_nan(results.recovered(run.before, last, run.p_top1)),
    )


def _absolute(name: str) -> str:
    """Return a run's absolute name, the same however the user wrote it."""
    if is_remote(name):
        scheme, _, rest = name.partition("://")
        return f"{scheme}://{PurePosixPath(rest)}"
    return str(Path(name).expanduser().resolve())


def labels(names: Sequence[str | Path]) -> list[str]:
    """Return the runs' labels: their paths below their common parent.

    Args:
      names: of the runs' folders, local or remote, as the user gave them.

    Raises:
      InputError: a folder is given twice, or there are fewer than two.
    """
    whole = [_absolute(str(name)) for name in names]
    twice = {name for name in whole if whole.count(name) > 1}
    if twice:
        raise InputError(f"{min(twice)}: given twice")
    if len(whole) < 2:
        command = invocation.mode("compare")
        raise InputError(f"{command} needs two folders of runs or more")
    parts = [name.split("/") for name in whole]
    parents = zip(*(path[:-1] for path in parts), strict=False)
    common = len(list(itertools.takewhile(lambda some: len(set(some)) == 1, parents)))
    return ["/".join(path[common:]) for path in parts]


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the keys in which runs differ, with each run's value as text."""
    keys = sorted({key for run in runs for key in run.config})
    configs = [settings.complete(run.config) for run in runs]
    values = {
        key: [json.dumps(config[key]) if key in config else "-" for config in configs]
        for key in keys
    }
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def make_groups(entries: Sequence[Entry]) -> list[Group]:
    """Group the runs that differ only in the seed and in keys without effect on Q."""
    different = {
        key: values
        for key, values in differing([entry.run for entry in entries]).items()
        if key != "seed" and settings.differs_in_result(key)
    }
    found: dict[tuple[str, ...], list[Entry]] = {}
    for i, entry in enumerate(entries):
        found.setdefault(tuple(v[i] for v in different.values()), []).append(entry)
    # The bits are not in the label, because they have a column.
    short = [key for key in different if not key.endswith("_bits")]
    groups = []
    for values, members in found.items():
        named = dict(zip(different, values, strict=True))
        label = ", ".join(f"{key}={named[key]}" for key in short)
        groups.append(Group(label or "same keys", members))
    return groups


def rows(entries: Iterable[Entry]) -> list[list[str]]:
    """Return the texts of `COLUMNS`, a row for each run."""
    return [
        [
            entry.label,
            entry.run.bits,
            str(entry.run.config["seed"]),
            f"{entry.run.step:,}{'' if entry.run.summary else '…'}",
            *(number(x) for x in (entry.p, entry.before, entry.last, entry.best)),
            number(entry.recovered),
        ]
        for entry in entries
    ]


def group_rows(groups: Iterable[Group]) -> list[list[str]]:
    """Return the texts of `GROUP_COLUMNS`, a row for each group."""
    return [
        [
            group.label,
            group.entries[0].run.bits,
            str(len(group.finished)),
            number(group.spread("before").mean),
            *map(number, group.spread("last")),
            number(group.spread("best").mean),
            number(group.spread("recovered").mean),
        ]
        for group in groups
    ]


def to_text(entries: Sequence[Entry]) -> str:
    """Render the comparison for a terminal, at most 80 columns wide."""
    said = [
        tables.to_text("Top-1 of the runs, per cent", COLUMNS, rows(entries), "llr"),
        tables.to_text(
            "Means over the seeds",
            GROUP_COLUMNS,
            group_rows(make_groups(entries)),
            "llr",
        ),
    ]
    different = differing([entry.run for entry in entries])
    said.append("Keys that differ:" if different else "No key differs.")
    for key, values in different.items():
        line = f"config.{key}: {', '.join(values)}"
        said.append(textwrap.fill(line, tables.WIDTH, subsequent_indent="    "))
    return "\n".join(said)


def curves(entries: Sequence[Entry]) -> Figure | None:
    """Draw top-1 of Q over the steps, a line for each run, a colour for each group."""
    if not any(entry.run.evaluations for entry in entries):
        return None
    said, groups = [], make_groups(entries)
    names = [f"{i}: {group.entries[0].run.bits}" for i, group in enumerate(groups, 1)]
    # Names that include bits of the first and last layers are too long for 3 columns.
    columns = 3 if max(map(len, names)) < 15 else 2
    rows_of_legend = -(-len(names) // columns) if len(names) <= _LEGEND_MOST else 0
    with canvas("curves", 3.2 + 0.2 * rows_of_legend) as plot:
        for i, group in enumerate(groups):
            style = {
                "color": COLORS[CYCLE[i % len(CYCLE)]],
                "marker": _MARKERS[i % len(_MARKERS)],
                "linestyle": ("-", "--", ":")[i // len(CYCLE) % 3],
            }
            label = names[i]
            for entry in group.entries:
                if entry.run.evaluations:
                    steps, tops = zip(*entry.run.evaluations, strict=True)
                    plot.axes.plot(steps, tops, label=label, alpha=0.8, **style)
                    label = "_"  # one entry in the legend for each group
            mean = number(group.spread("last").mean)
            said.append(f"{names[i]}, {group.label}, mean {mean} %")
        plot.axes.set(xlabel="step", ylabel="top-1 of Q, %")
        if rows_of_legend:
            plot.legend(columns)
    caption = "; ".join(said) + "."
    if not rows_of_legend:
        caption = f"Colours and marks are as in “Where they ended”. {caption}"
    return Figure("curves", "Accuracy over the steps", caption, plot.svg)


def lasts(entries: Sequence[Entry]) -> Figure | None:
    """Draw the last accuracy of each run, and the mean of each group."""
    groups = [
        (i, group)
        for i, group in enumerate(make_groups(entries))
        if not math.isnan(group.spread("last").mean)
    ]
    if not groups:
        return None
    said = []
    with canvas("lasts", 1.2 + 0.4 * len(groups)) as plot:
        for height, (i, group) in enumerate(groups):
            color = COLORS[CYCLE[i % len(CYCLE)]]
            values = [entry.last for entry in group.finished]
            marker = _MARKERS[i % len(_MARKERS)]
            plot.axes.plot(values, [height] * len(values), marker, color=color)
            mean, std = group.spread("last")
            plot.axes.plot(mean, height, "|", color=INK, markersize=16)
            said.append(f"{i + 1}: {with_spread(mean, std)} % (runs: {len(values)})")
        names = [f"{i + 1}: {group.entries[0].run.bits}" for i, group in groups]
        plot.axes.set_yticks(range(len(groups)), names)
        plot.axes.set_ylim(len(groups) - 0.5, -0.5)
        plot.axes.set(xlabel="last top-1 of Q, %", ylabel="group")
    caption = f"{'; '.join(said)}. Upright strokes: means."
    return Figure("lasts", "Where they ended", caption, plot.svg)


def render(entries: Sequence[Entry]) -> str:
    """Render the page of a comparison."""
    runs = [entry.run for entry in entries]
    title = f"{len(entries)} runs compared"
    different = differing(runs)
    notes = [f"{e.label}: {note}" for e in entries for note in e.run.notes]
    notes += [
        f"{e.label}: Its numbers failed: {e.run.failure}"
        for e in entries
        if e.run.failure
    ]
    unfinished = [e.label for e in entries if not e.run.summary]
    if unfinished:
        notes.append(f"Not finished (…): {', '.join(unfinished)}.")
    return page.render(
        "compare.html",
        title=title,
        notes=notes,
        figures=[lasts(entries), curves(entries)],
        columns=COLUMNS,
        rows=rows(entries),
        group_columns=("number", *GROUP_COLUMNS),
        group_rows=[
            [i, *row] for i, row in enumerate(group_rows(make_groups(entries)), 1)
        ],
        labels=[entry.label for entry in entries],
        different=[[key, *values] for key, values in different.items()],
    )


def write(
    folders: Sequence[Path], path: Path, names: Sequence[str] | None = None
) -> str:
    """Write a comparison's page; return the comparison for a terminal.

    Args:
      folders: the runs' folders.
      path: of the page.
      names: of the folders as the user gave them; by default their paths.

    Raises:
      InputError: a folder has no run or is given twice, or matplotlib is missing.
    """
    drawing.need_matplotlib()
    entries = [
        make_entry(label, gather.read(folder))
        for label, folder in zip(labels(names or folders), folders, strict=True)
    ]
    files.write_text(path, render(entries))
    return to_text(entries)
