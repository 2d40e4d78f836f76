"""Figures of Q's layers, of P's and Q's classes, and of sizes; None without data."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adadfq_jax.report.drawing import COLORS, Figure, canvas
from adadfq_jax.report.gather import Run
from adadfq_jax.report.snapshot import BINS, SPAN, Answers, Layers

MATRIX_MOST = 20  # classes; a matrix of more has points instead of numbers
_ROW = 0.19  # inches of height for a layer


def short_names(names: Iterable[str]) -> list[str]:
    """Remove the suffixes that most layers' names repeat: `.conv.kernel:input`."""
    short = list(map(str, names))
    for suffix in (":input", ".kernel", ".conv"):
        short = [name.removesuffix(suffix) for name in short]
    return short


def _range_of(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    return f"{finite.min():.1f} to {finite.max():.1f} dB" if finite.size else "none"


def noise(
    name: str, title: str, layers: Mapping[str, Layers | None], step: int
) -> Figure | None:
    """Draw the ratio of signal to quantization noise by layer.

    Args:
      name: of the figure.
      title: of the figure.
      layers: of one network, by the name of the data that they were measured on.
      step: of the recording.
    """
    there = {on: found for on, found in layers.items() if found and len(found.names)}
    if not there:
        return None
    first = next(iter(there.values()))
    rows, said = np.arange(len(first.names)), []
    styles = (("blue", "o"), ("red", "D"))
    with canvas(name, 1.0 + _ROW * len(rows)) as plot:
        for (on, found), (color, marker) in zip(there.items(), styles, strict=False):
            plot.axes.plot(
                found.sqnr, rows, marker, color=COLORS[color], label=on, alpha=0.85
            )
            worst = (
                int(np.nanargmin(found.sqnr)) if np.isfinite(found.sqnr).any() else 0
            )
            said.append(
                f"{on}: {_range_of(found.sqnr)}, the least in"
                f" {short_names(found.names)[worst]}"
            )
        plot.axes.set_yticks(rows, short_names(first.names), fontsize=8)
        plot.axes.set(xlabel="signal to noise, dB", ylabel="layer")
        plot.axes.set_ylim(len(rows) - 0.4, -0.6)
        if len(there) > 1:
            plot.legend(2)
    caption = f"At step {step:,}. {'; '.join(said)}. More is better."
    return Figure(name, title, caption, plot.svg)


def ranges(name: str, title: str, layers: Layers | None, step: int) -> Figure | None:
    """Draw each layer's distribution, with its range's ends at 0 and 1."""
    if layers is None or not len(layers.names):
        return None
    edges = np.linspace(*SPAN, BINS + 1)
    centers = (edges[1:] + edges[:-1]) / 2
    rows = np.arange(len(layers.names))
    with canvas(name, 1.0 + 1.25 * _ROW * len(rows)) as plot:
        for row, shares in zip(rows, layers.histogram, strict=True):
            # The root makes rare values visible; one bin may have nearly all values.
            height = np.sqrt(shares / max(shares.max(), 1e-12)) * 0.95
            plot.axes.fill_between(
                centers, row + 0.4, row + 0.4 - height, step="mid",
                color=COLORS["blue"], alpha=0.6, lw=0,
            )  # fmt: skip
        for end in (0, 1):
            plot.axes.axvline(end, color=COLORS["red"], linestyle="--", linewidth=1.2)
        labels = [
            f"{n}  [{lo:.2g}, {hi:.2g}]"
            for n, lo, hi in zip(
                short_names(layers.names), layers.lo, layers.hi, strict=True
            )
        ]
        plot.axes.set_yticks(rows, labels, fontsize=8)
        plot.axes.grid(visible=False, axis="y")
        plot.axes.set_ylim(len(rows) - 0.4, -0.8)
        plot.axes.set(xlabel="place in the range, no unit", ylabel="layer [lo, hi]")
        plot.axes.set_xlim(*SPAN)
    clipped_shares = beyond(layers)
    most = int(np.argmax(clipped_shares))
    caption = f"At step {step:,}. Broken lines: the ends of the range; "
    if clipped_shares[most] > 0:
        worst = short_names(layers.names)[most]
        caption += (
            "values beyond are clipped, at most"
            f" {100 * clipped_shares[most]:.2g} % of a layer's values (in {worst})."
        )
    else:
        caption += "no value lies beyond."
    caption += " Heights are square roots of shares."
    return Figure(name, title, caption, plot.svg)


def beyond(layers: Layers) -> np.ndarray:
    """Return the shares of values outside the range [L], with a bin's precision."""
    edges = np.linspace(*SPAN, BINS + 1)
    outside = (edges[1:] <= 1e-9) | (edges[:-1] >= 1 - 1e-9)
    # A value equal to hi falls into the bin that begins at 1, which thus is inside.
    outside[np.searchsorted(edges, 1 - 1e-9)] = False
    return layers.histogram[:, outside].sum(1)


def blocks(run: Run) -> Figure | None:
    """Draw the error of each block's output, before and after its reconstruction."""
    errors = run.summary.get("block_errors") if run.summary else None
    if not errors:
        return None
    names = short_names(error["block"] for error in errors)
    rows = np.arange(len(errors))
    with canvas("block-errors", 1.0 + _ROW * len(rows)) as plot:
        for when, color, marker in (("before", "red", "D"), ("after", "blue", "o")):
            shares = [100 * error[when] for error in errors]
            plot.axes.plot(
                shares, rows, marker, color=COLORS[color], label=when, alpha=0.85
            )
        plot.axes.set_yticks(rows, names, fontsize=8)
        plot.axes.set(xlabel="squared error, % of P's output", ylabel="block")
        plot.axes.set_ylim(len(rows) - 0.4, -0.6)
        plot.legend(2)
    first, last = errors[0], errors[-1]
    caption = (
        "On all images that the blocks learn from, after the blocks before it are done."
        f" {names[0]}: {100 * first['before']:.3g} % before,"
        f" {100 * first['after']:.3g} % after; {names[-1]}:"
        f" {100 * last['before']:.3g} % before, {100 * last['after']:.3g} % after."
    )
    return Figure("block-errors", "Error of each block", caption, plot.svg)


def sensitivity(run: Run) -> Figure | None:
    """Draw each layer's divergence at the number of bits at which it was ranked."""
    found = run.sensitivity
    if not found or not found["layers"]:
        return None
    bits, layers = str(found["ranked_at"]), found["layers"]
    names, rows = [layer["name"] for layer in layers], np.arange(len(layers))
    with canvas("sensitivity", 1.0 + _ROW * len(rows)) as plot:
        styles = {"kernel": ("blue", "o"), "operand": ("red", "D")}
        for part, (color, marker) in styles.items():
            values = [
                layer["divergence"].get(part, {}).get(bits, np.nan) for layer in layers
            ]
            plot.axes.plot(
                values, rows, marker, color=COLORS[color], label=part, alpha=0.85
            )
        plot.axes.set_yticks(rows, short_names(names), fontsize=8)
        plot.axes.set(xlabel="divergence of Q from P, nats", ylabel="layer")
        plot.axes.set_xscale("symlog", linthresh=1e-4)
        plot.axes.set_ylim(len(rows) - 0.4, -0.6)
        plot.legend(2)
    caption = f"Only this layer at {bits} bits, on images of G. {found['advice']}"
    return Figure("sensitivity", "Sensitivity of each layer", caption, plot.svg)


def layer_table(kernels: Layers, activations: Layers) -> list[list[str]]:
    """Make the rows (kind, layer, lo, hi, signal to noise in dB) of a table."""
    return [
        [kind, name, f"{lo:.4g}", f"{hi:.4g}", f"{sqnr:.1f}"]
        for kind, layers in (("kernel", kernels), ("activation", activations))
        for name, lo, hi, sqnr in zip(
            short_names(layers.names), layers.lo, layers.hi, layers.sqnr, strict=True
        )
    ]


def confusion(
    name: str, title: str, answers: Answers | None, classes: int, step: int
) -> Figure | None:
    """Draw how often Q gives each class for each class of P."""
    if answers is None or not len(answers.labels):
        return None
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (answers.p, answers.q), 1)
    draw = _draw_matrix if classes <= MATRIX_MOST else _draw_points
    with canvas(name, 4.2) as plot:
        draw(plot.axes, counts)
        plot.axes.set(xlabel="Q's class", ylabel="P's class", aspect="equal")
        plot.axes.grid(visible=False)
    agreed, total = int(np.trace(counts)), len(answers.labels)
    off = counts - np.diag(np.diag(counts))
    pairs = [np.unravel_index(i, off.shape) for i in np.argsort(-off, None)[:3]]
    most = [f"{p} for {q} (on {off[p, q]})" for p, q in pairs if off[p, q]]
    caption = (
        f"At step {step:,} Q agrees with P on {agreed:,} of {total:,} images"
        f" ({100 * agreed / total:.1f} %)."
    )
    if most:
        caption += f" Most often Q takes P's class {', '.join(most)}."
    return Figure(name, title, caption, plot.svg)


def _draw_matrix(axes: Any, counts: np.ndarray) -> None:
    """Draw a square for each pair of classes, shaded by its share of P's class."""
    from matplotlib.patches import Rectangle

    size = len(counts)
    for p, q in np.argwhere(counts):
        share = counts[p, q] / counts[p].sum()
        color = COLORS["blue" if p == q else "red"]
        axes.add_patch(
            Rectangle((q - 0.5, p - 0.5), 1, 1, color=color, alpha=0.15 + 0.6 * share)
        )
        axes.text(q, p, counts[p, q], ha="center", va="center", fontsize=8)
    axes.set_xticks(range(size), range(size), fontsize=8)
    axes.set_yticks(range(size), range(size), fontsize=8)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))


def _draw_points(axes: Any, counts: np.ndarray) -> None:
    """Draw a point for each pair of classes, whose area grows with the count."""
    p, q = np.nonzero(counts)
    colors = [COLORS["blue" if a == b else "red"] for a, b in zip(p, q, strict=True)]
    axes.scatter(q, p, s=6 + 4 * counts[p, q], c=colors, alpha=0.6, linewidths=0)
    axes.set(xlim=(-1, len(counts)), ylim=(len(counts), -1))


def sizes(run: Run) -> Figure | None:
    """Draw the bytes of P's file and of Q's file."""
    if "Q" not in run.sizes:
        return None
    names, values = list(run.sizes), [size / 1024 for size in run.sizes.values()]
    with canvas("sizes", 1.0 + 0.4 * len(names)) as plot:
        bars = plot.axes.barh(
            names, values, color=[COLORS["green"], COLORS["blue"]][-len(names) :]
        )
        plot.axes.bar_label(bars, [f"{v:,.0f} KiB" for v in values], padding=3)
        plot.axes.set(xlabel="KiB", ylabel="file")
        plot.axes.margins(x=0.25)
        plot.axes.invert_yaxis()
        plot.axes.grid(visible=False, axis="y")
    caption = "; ".join(f"{k} {v:,} bytes" for k, v in run.sizes.items()) + "."
    return Figure("sizes", "File sizes", caption, plot.svg)
