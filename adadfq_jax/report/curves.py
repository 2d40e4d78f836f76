"""Figures over the steps of a run; each is None where its data are missing."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from adadfq_jax.report.drawing import COLORS, CYCLE, INK, Figure, canvas
from adadfq_jax.report.gather import Run

# Numbers in a row of metrics.jsonl that are no loss terms.
_OTHER = ("step", "g_rate", "q_rate", "p_agrees", "steps_per_second")
_UNITS = {"disagreement": "nats", "agreement": "nats"}
_DASHES = ("-", "--", ":")


def loss_terms(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the losses and their terms, the players' sums first."""
    names = {
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, float) and name not in _OTHER
    }
    terms = sorted(name for name in names if not name.startswith("h_"))
    return sorted(terms, key=lambda name: name not in ("generator", "student"))


def _values(run: Run, name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in run.rows if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def _mark_training(axes: Any, run: Run) -> None:
    """Draw a line where Q begins to train."""
    warmup = run.config["game.warmup_steps"]
    if 0 < warmup < run.step:
        axes.axvline(warmup, color=COLORS["purple"], linewidth=1, linestyle=":")


def accuracy(run: Run) -> Figure | None:
    """Draw top-1 of P and Q over the steps."""
    if not run.evaluations:
        return None
    steps, tops = zip(*run.evaluations, strict=True)
    said = [f"Q {top:.2f} % at step {step:,}" for step, top in run.evaluations]
    with canvas("accuracy") as plot:
        plot.axes.plot(steps, tops, "o-", color=COLORS["blue"], label="Q")
        if run.p_top1 is not None:
            plot.axes.axhline(
                run.p_top1, color=COLORS["green"], linestyle="--", label="P"
            )
            said.insert(0, f"P {run.p_top1:.2f} %")
        if run.before is not None:
            plot.axes.axhline(
                run.before, color=COLORS["red"], linestyle=":", label="Q before"
            )
            said.insert(1, f"Q before it trained {run.before:.2f} %")
        plot.axes.set(xlabel="step", ylabel="top-1, %")
        plot.axes.margins(y=0.15)
        plot.legend(3)
    return Figure("accuracy", "Accuracy", "; ".join(said) + ".", plot.svg)


def curve(run: Run, name: str) -> Figure | None:
    """Draw one number of the log over the steps."""
    steps, values = _values(run, name)
    if not steps:
        return None
    unit = _UNITS.get(name, "no unit")
    address = f"loss-{re.sub(r'[^0-9A-Za-z_]+', '-', name)}"
    with canvas(address, 2.3) as plot:
        marker = "o" if len(steps) < 3 else ""
        plot.axes.plot(steps, values, color=COLORS["blue"], marker=marker)
        _mark_training(plot.axes, run)
        plot.axes.set(xlabel="step", ylabel=f"{name}, {unit}")
    caption = (
        f"{values[0]:.4g} at step {steps[0]:,}, {values[-1]:.4g} at step"
        f" {steps[-1]:,}; from {min(values):.4g} to {max(values):.4g}."
    )
    return Figure(address, name, caption, plot.svg)


def _boundaries(run: Run) -> dict[str, float]:
    """Return lambda_l and lambda_u, if the recipe has the margin loss."""
    if not any("margin" in row for row in run.rows):
        return {}
    names = ("lambda_l", "lambda_u")
    values = {name: run.config.get(f"game.{name}") for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _apart(low: float, high: float, gap: float) -> tuple[float, float]:
    """Move two numbers, low <= high, at least a gap apart within [0, 1]."""
    middle = min(max((low + high) / 2, gap / 2), 1 - gap / 2)
    return min(low, middle - gap / 2), max(high, middle + gap / 2)


def _label_boundaries(axes: Any, boundaries: dict[str, float]) -> None:
    """Write the names beside the lines; move them apart if they would overlap."""
    names = sorted(boundaries, key=lambda name: boundaries[name])
    places = [boundaries[name] for name in names]
    if len(places) == 2:
        low, high = places
        places = [*_apart(low, high, 0.09)]  # the height of a line of text
    for name, place in zip(names, places, strict=True):
        axes.annotate(
            f"{name} {boundaries[name]:g}",
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=COLORS["red"],
            fontsize=9,
        )


def h_bands(run: Run) -> Figure | None:
    """Draw H' over the steps, as bands of quantiles."""
    rows = [row for row in run.rows if "h_q50" in row]
    if not rows:
        return None
    steps = [row["step"] for row in rows]

    def of(name: str) -> np.ndarray:
        return np.asarray([row[name] for row in rows])

    with canvas("h-bands", 3.2) as plot:
        axes, color = plot.axes, COLORS["blue"]
        bands = {"all": ("h_min", "h_max", 0.18), "80 %": ("h_q10", "h_q90", 0.35)}
        for label, (low, high, alpha) in bands.items():
            axes.fill_between(
                steps, of(low), of(high), color=color, alpha=alpha, label=label, lw=0
            )
        marker = "o" if len(steps) < 3 else ""
        axes.plot(steps, of("h_q50"), color=color, marker=marker, label="median")
        for value in _boundaries(run).values():
            axes.axhline(value, color=COLORS["red"], linestyle="--", linewidth=1.2)
        _label_boundaries(axes, _boundaries(run))
        _mark_training(axes, run)
        axes.set(xlabel="step", ylabel="H' of a batch, no unit", ylim=(-0.02, 1.02))
        plot.legend(3)
    last = rows[-1]
    caption = (
        f"Median H' {rows[0]['h_q50']:.2f} at step {steps[0]:,} and"
        f" {last['h_q50']:.2f} at step {steps[-1]:,}, where 80 % lie between"
        f" {last['h_q10']:.2f} and {last['h_q90']:.2f}. Quantiles of each batch,"
        " averaged over the logging interval."
    )
    if bounds := _boundaries(run):
        caption += " Boundaries: " + ", ".join(f"{k} {v:g}" for k, v in bounds.items())
        caption += "."
    return Figure("h-bands", "H' over the steps", caption, plot.svg)


def spread(items: Sequence[Any]) -> list[Any]:
    """Return the first, the middle and the last item, or all if there are fewer."""
    if len(items) < 3:
        return list(items)
    return [items[0], items[len(items) // 2], items[-1]]


def h_histogram(run: Run) -> Figure | None:
    """Draw H' of generated images at the start, in the middle and at the end."""
    chosen = spread(run.snapshots)
    if not chosen:
        return None
    edges = np.linspace(0, 1, 21)
    said = []
    with canvas("h-histogram", 2.8) as plot:
        for shot, color, dash in zip(chosen, CYCLE, _DASHES, strict=False):
            counts, _ = np.histogram(np.clip(shot.h, 0, 1), edges)
            plot.axes.stairs(
                100 * counts / len(shot.h),
                edges,
                color=COLORS[color],
                linestyle=dash,
                linewidth=1.6,
                label=f"step {shot.step:,}",
            )
            low, high = np.quantile(shot.h, [0.1, 0.9])
            said.append(
                f"Step {shot.step:,}: mean {np.mean(shot.h):.2f}, 80 % between"
                f" {low:.2f} and {high:.2f}."
            )
        for value in _boundaries(run).values():
            plot.axes.axvline(value, color=INK, linestyle="-.", linewidth=1)
        plot.axes.set(xlabel="H', no unit", ylabel="images, %", xlim=(0, 1))
        plot.legend(3)
    count = len(chosen[0].h)
    caption = f"{' '.join(said)} {count} images of G from the same noise each time."
    if _boundaries(run):
        caption += " Vertical lines: the boundaries."
    return Figure("h-histogram", "H' of generated images", caption, plot.svg)


def agreement(run: Run) -> Figure | None:
    """Draw how often P's class is the label that G was given."""
    steps, values = _values(run, "p_agrees")
    if not steps:
        return None
    shares = [100 * value for value in values]
    chance = 100 / run.config["teacher.num_classes"]
    with canvas("p-agrees", 2.5) as plot:
        marker = "o" if len(steps) < 3 else ""
        plot.axes.plot(steps, shares, color=COLORS["blue"], marker=marker, label="P")
        plot.axes.axhline(
            chance, color=COLORS["red"], linestyle=":", label=f"chance, {chance:.3g} %"
        )
        _mark_training(plot.axes, run)
        plot.axes.set(xlabel="step", ylabel="p_agrees, % of images", ylim=(0, 101))
        plot.legend(2)
    caption = (
        f"P's class is the label that G was given on {shares[0]:.1f} % of the"
        f" images at step {steps[0]:,} and on {shares[-1]:.1f} % at step {steps[-1]:,};"
        f" chance is {chance:.3g} %."
    )
    return Figure("p-agrees", "P's agreement with the labels", caption, plot.svg)


def rates(run: Run) -> Figure | None:
    """Draw both players' learning rates."""
    drawn: dict[str, Any] = {}
    for name in ("g_rate", "q_rate"):
        steps, values = _values(run, name)
        kept = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]
        if kept:
            drawn[name] = tuple(zip(*kept, strict=True))
    if not drawn:
        return None
    said = []
    with canvas("rates", 2.3) as plot:
        for name, color, dash in zip(drawn, CYCLE, _DASHES, strict=False):
            steps, values = drawn[name]
            marker = "o" if len(steps) < 3 else ""
            plot.axes.plot(
                steps, values, dash, color=COLORS[color], marker=marker, label=name
            )
            said.append(
                f"{name} {values[0]:.3g} at step {steps[0]:,}, {values[-1]:.3g} at step"
                f" {steps[-1]:,}"
            )
        plot.axes.set(xlabel="step", ylabel="rate, per step", yscale="log")
        # A log axis's default ticks are formulas, which `text.parse_math` turns off.
        plot.axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        plot.axes.yaxis.set_minor_formatter("")
        plot.axes.margins(y=0.3)
        plot.legend(2)
    return Figure("rates", "Learning rates", "; ".join(said) + ".", plot.svg)


def speed(run: Run) -> Figure | None:
    """Draw the steps per second."""
    steps, values = _values(run, "steps_per_second")
    if not steps:
        return None
    with canvas("speed", 2.3) as plot:
        marker = "o" if len(steps) < 3 else ""
        plot.axes.plot(steps, values, color=COLORS["blue"], marker=marker)
        plot.axes.set(xlabel="step", ylabel="steps per second")
        plot.axes.set_ylim(bottom=0)
    caption = f"Median {np.median(values):.2f} steps a second, counting training only."
    return Figure("speed", "Speed", caption, plot.svg)
