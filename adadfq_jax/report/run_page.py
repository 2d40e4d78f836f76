"""The report of one run: `report/index.html` in its workdir."""

import json
from pathlib import Path
from typing import Any

from adadfq_jax import errors, settings
from adadfq_jax.report import curves, drawing, gather, layer_figures, page, pictures
from adadfq_jax.report.gather import Run
from adadfq_jax.runtime import files

FOLDER = "report"
PAGE = "index.html"


def write(workdir: Path, name: str = "") -> Path:
    """Write the report of a run, finished or not; return its path.

    Args:
      workdir: of the run.
      name: a title for the run; by default its folder's name.

    Raises:
      InputError: there is no run, a file of it is damaged, or matplotlib is missing.
    """
    drawing.need_matplotlib()
    content = render(gather.read(workdir, name))
    path = workdir / FOLDER / PAGE
    path.parent.mkdir(exist_ok=True)
    files.write_text(path, content)
    return path


def attempt(workdir: Path, name: str = "") -> str:
    """Write a report, see `write`; return a line with its path or with the error."""
    try:
        return f"report: {write(workdir, name)}"
    except Exception as error:
        # A run is complete without its report. Whatever fails in the report, the
        # exported files and the table still come.
        return f"WARNING: no report: {errors.one_line(error)}"


def headline(run: Run) -> str:
    """Say in one sentence what was done and with which accuracy."""
    config = run.config
    what = f"{config['teacher.model']} in {run.bits} without a real image"
    if run.failure and not run.summary:
        return f"{what}: its numbers failed, {run.failure}"
    if not run.summary:
        played = f"{run.step:,} of {config['game.steps']:,} steps"
        what = f"{what}: not finished, {played}"
    if not run.evaluations:
        return f"{what}{':' if run.summary else ','} accuracy not measured"
    top1 = f"top-1 {run.evaluations[-1][1]:.2f} %"
    of_p = f", P {run.p_top1:.2f} %" if run.p_top1 is not None else ""
    return f"{what}{':' if run.summary else ','} {top1}{of_p}"


def facts(run: Run) -> str:
    """Say in one line the data, the recipe, the time and the sizes."""
    config, found = run.config, []
    if run.evaluations:
        name = (config[f"eval.{key}"] for key in ("dataset", "data_dir", "split"))
        found.append(f"measured on {settings.split_name(*name)}")
    found.append(f"recipe {config['recipe']}, seed {config['seed']}")
    each = " on each device" if config["game.batch_rule"] == "per_device" else ""
    found.append(
        f"batch {config['game.batch_size']}{each}, {config['game.steps']:,} steps"
    )
    if run.summary:
        found.append(f"{run.summary['seconds']:,.0f} s on {run.summary['device']}")
        share = run.summary.get("recovered")
        if share is not None and share >= 0:
            found.append(f"{100 * share:.0f} % of the lost accuracy recovered")
        elif share is not None:
            found.append("Q ended below its start")
    if len(run.sizes) == 2:
        p, q = run.sizes.values()
        found.append(f"Q's file {p / q:.1f} times smaller than P's")
    return "; ".join(found) + "."


def render(run: Run) -> str:
    """Render the page of a run."""
    title = headline(run)
    return page.render(
        "run.html",
        title=f"{run.name}: {title}",
        headline=title,
        facts=facts(run),
        notes=run.notes,
        accuracy=[curves.accuracy(run), layer_figures.sizes(run)],
        measured=bool(run.evaluations),
        phases=_phases(run),
        game=[curves.h_bands(run), curves.h_histogram(run), curves.agreement(run)],
        losses=[curves.curve(run, name) for name in curves.loss_terms(run.rows)],
        reconstruction=[layer_figures.blocks(run)],
        bits=[layer_figures.sensitivity(run)],
        recorded=_recorded(run) if run.snapshots else None,
        rates=[curves.rates(run), curves.speed(run)],
        command=run.command,
        keys=_keys(run),
        versions=_versions(run),
    )


def _phases(run: Run) -> str:
    """Describe the schedule, which the vertical lines in the figures show."""
    observe, warmup = (run.config[f"game.{k}_steps"] for k in ("observe", "warmup"))
    iterations = run.config.get("reconstruction.iterations", 0)
    game = run.config["game.steps"]
    trains = f"Q trains from step {warmup:,}" if warmup < game or not iterations else ""
    rebuilt = ""
    if iterations:
        rebuilt = (
            f"from step {game:,} Q's blocks are reconstructed one after the other, each"
            f" in {iterations:,} steps"
        )
    if run.config.get("calibration.images"):
        trains = "Q is then calibrated, not trained"
    then = "; ".join(part for part in (trains, rebuilt) if part)
    return (
        f"Ranges are observed to step {observe:,}; {then};"
        f" a dotted vertical line marks step {warmup:,} in the figures over the"
        " steps."
    )


def _recorded(run: Run) -> dict[str, Any]:
    """Return the figures that show the recordings."""
    last, several = run.snapshots[-1], curves.spread(run.snapshots)
    layers = {"images of G": last.activations, "evaluation": last.real_activations}
    step, count = last.step, run.config["teacher.num_classes"]
    both = (("generated", "images of G"), ("real", "evaluation images"))
    answers = {name: getattr(last, name) for name, _ in both}
    ranges = (
        ("kernel-ranges", "Kernels in the ranges of their channels", last.kernels),
        (
            "activation-ranges",
            "Activations in their ranges, images of G",
            last.activations,
        ),
        (
            "real-activation-ranges",
            "Activations in their ranges, evaluation images",
            last.real_activations,
        ),
    )
    return {
        "images": [pictures.by_class(several, _classes_shown(run))],
        "has_real": last.real is not None,
        "answers": [
            *(
                layer_figures.confusion(
                    f"confusion-{name}", f"On {images}", answers[name], count, step
                )
                for name, images in both
            ),
            *(
                pictures.disputed(
                    f"disputed-{name}", f"Where they differ, {images}", answers[name]
                )
                for name, images in both
            ),
        ],
        "layers": [
            layer_figures.noise(
                "kernel-noise",
                "Noise of quantized kernels",
                {"kernels": last.kernels},
                step,
            ),
            layer_figures.noise(
                "activation-noise", "Noise of quantized activations", layers, step
            ),
            *(layer_figures.ranges(*shown, step) for shown in ranges),
        ],
        "table": layer_figures.layer_table(last.kernels, last.activations),
    }


def _classes_shown(run: Run) -> list[int]:
    """Return the classes of which the recordings have the most images."""
    answers = run.snapshots[-1].generated
    labels = answers.labels[answers.shown].tolist()
    often = max(labels.count(label) for label in labels)
    return sorted({label for label in labels if labels.count(label) >= often // 2})[:10]


def _keys(run: Run) -> list[tuple[str, str, str]]:
    """Return the configuration: key, value, and 'set' where it is not the default."""
    defaults = settings.complete({})
    return [
        (key, json.dumps(value), "" if defaults.get(key) == value else "set")
        for key, value in sorted(run.config.items())
    ]


def _versions(run: Run) -> str | None:
    """Name the packages and their versions; None where the run is not finished."""
    if not run.summary:
        return None
    versions = run.summary.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
