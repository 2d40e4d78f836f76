"""The report of one run: `report/index.html` in its workdir."""

import json
from pathlib import Path
from typing import Any

from adadfq_jax import config as base
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
    found.append(f"batch {config['game.batch_size']}, {config['game.steps']:,} steps")
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
    notes = "".join(f'<p class="note">{page.text(note)}</p>' for note in run.notes)
    losses = [curves.curve(run, name) for name in curves.loss_terms(run.rows)]
    body = [
        f'<h1>{page.text(title)}</h1><p class="facts">{page.text(facts(run))}</p>',
        notes,
        page.section(
            "How well",
            [curves.accuracy(run), layer_figures.sizes(run)],
            "There are no accuracies and no files yet.",
        ),
        "" if run.evaluations else "<p>There is no evaluation to show.</p>",
        _phases(run),
        page.section(
            "The game",
            [curves.h_bands(run), curves.h_histogram(run), curves.agreement(run)],
            "No step has been logged yet.",
        ),
        page.section("Losses", losses),
        page.section("Reconstruction", [layer_figures.blocks(run)]),
        page.section("Bits per layer", [layer_figures.sensitivity(run)]),
        _recorded(run),
        page.section("Rates and speed", [curves.rates(run), curves.speed(run)]),
        _repeat(run),
    ]
    return page.document(f"{run.name}: {title}", "".join(body))


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
        f"<p>Ranges are observed to step {observe:,}; {then};"
        f" a dotted vertical line marks step {warmup:,} in the figures over the"
        " steps.</p>"
    )


def _recorded(run: Run) -> str:
    """Render the sections that show the recordings."""
    if not run.snapshots:
        return (
            "<p>Images, layers and answers were not recorded"
            " (report.enabled, from the first step at which Q trains).</p>"
        )
    last, several = run.snapshots[-1], curves.spread(run.snapshots)
    classes = _classes_shown(run)
    layers = {"images of G": last.activations, "evaluation": last.real_activations}
    step, count = last.step, run.config["teacher.num_classes"]
    no_real = "" if last.real else "<p>There are no evaluation images to show.</p>"
    table = page.table(
        ["kind", "layer", "lo", "hi", "dB"],
        layer_figures.layer_table(last.kernels, last.activations),
        numbers=(2, 3, 4),
    )
    lf = layer_figures
    return "".join(
        [
            page.section("Images", [pictures.by_class(several, classes)]),
            no_real,
            page.section(
                "P against Q",
                [
                    lf.confusion(
                        "confusion-generated", "On images of G", last.generated,
                        count, step,
                    ),
                    lf.confusion(
                        "confusion-real", "On evaluation images", last.real, count, step
                    ),
                    pictures.disputed(
                        "disputed-generated", "Where they differ, images of G",
                        last.generated,
                    ),
                    pictures.disputed(
                        "disputed-real", "Where they differ, evaluation images",
                        last.real,
                    ),
                ],
            ),
            page.section(
                "Layers of Q",
                [
                    lf.noise(
                        "kernel-noise", "Noise of quantized kernels",
                        {"kernels": last.kernels}, step,
                    ),
                    lf.noise(
                        "activation-noise", "Noise of quantized activations", layers,
                        step,
                    ),
                    lf.ranges(
                        "kernel-ranges", "Kernels in the ranges of their channels",
                        last.kernels, step,
                    ),
                    lf.ranges(
                        "activation-ranges", "Activations in their ranges, images of G",
                        last.activations, step,
                    ),
                    lf.ranges(
                        "real-activation-ranges",
                        "Activations in their ranges, evaluation images",
                        last.real_activations, step,
                    ),
                ],
            ),
            page.details("Every layer in numbers", table),
        ]
    )  # fmt: skip


def _classes_shown(run: Run) -> list[int]:
    """Return the classes of which the recordings have the most images."""
    answers = run.snapshots[-1].generated
    labels = answers.labels[answers.shown].tolist()
    often = max(labels.count(label) for label in labels)
    return sorted({label for label in labels if labels.count(label) >= often // 2})[:10]


def _repeat(run: Run) -> str:
    """Render the command and the configuration."""
    body = ["<h2>To repeat it</h2>"]
    if run.command:
        body.append(f"<pre>{page.text(run.command)}</pre>")
    else:
        body.append("<p>The command was not recorded; this is the configuration.</p>")
    defaults = dict(gather.flatten(json.loads(base.default_config().to_json())))

    def changed(key: str, value: Any) -> str:
        return "" if defaults.get(key) == value else "set"

    rows = [(k, json.dumps(v), changed(k, v)) for k, v in sorted(run.config.items())]
    body.append(
        page.details(
            "The whole configuration",
            page.table(["config.", "value", "by the recipe or the command"], rows),
        )
    )
    if run.summary:
        versions = run.summary.get("versions", {})
        told = ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
        body.append(f'<p class="facts">{page.text(told)}.</p>')
    return "".join(body)
