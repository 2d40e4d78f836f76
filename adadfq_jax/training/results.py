"""The results of a run: its summary, the lines that it prints and the final table."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from adadfq_jax import settings
from adadfq_jax.deploy.quantized_file import FORMAT_VERSION
from adadfq_jax.runtime import tables
from adadfq_jax.runtime.versions import versions
from adadfq_jax.settings import Settings
from adadfq_jax.teacher import hub
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.reconstruct import BlockError

FAR_BELOW = 2.0  # warn if P's top-1 is more points than this below the expected
_BITS = ("weight_bits", "act_bits", "first_last_bits", "places", "layer_bits")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def recovered(
    before: float | None, last: float | None, p: float | None
) -> float | None:
    """Return the recovered share of the lost accuracy, (last - before) / (P - before).

    It is None if an accuracy is missing or if no accuracy was lost.
    """
    if before is None or last is None or p is None or p <= before:
        return None
    return (last - before) / (p - before)


def summarise(
    spec: Settings,
    *,
    p_top1: float | None,
    history: Sequence[tuple[int, float]],
    block_errors: Sequence[BlockError] = (),
    seconds: float,
    layer_bits: Mapping[str, int] = MappingProxyType({}),
    size: int,
    digest: str,
    command: str,
    devices: Sequence[jax.Device],
) -> dict[str, Any]:
    """Return the contents of summary.json.

    Accuracies are top-1 in per cent, None where evaluation is disabled.

    Args:
      spec: the settings of the run.
      p_top1: top-1 of P.
      history: (step, top-1) of Q. The entry at the end of the warm-up is Q before it
        trains; the last entry is the exported file.
      block_errors: the errors of the reconstructed blocks.
      seconds: duration of the run.
      layer_bits: bits of the kernels and activations that have others, by name, where
        settings give them.
      size: bytes of the exported file.
      digest: SHA-256 of the exported file.
      command: the command that started the run.
      devices: the devices that took part.
    """
    e = spec.eval
    last = history[-1][1] if history else None
    before = dict(history).get(spec.game.warmup_steps)
    trained = [h for h in history if h[0] > spec.game.warmup_steps] or history
    best = max(trained, key=lambda entry: entry[1], default=(None, None))
    return {
        "p_top1": p_top1,
        "q_before_top1": before,
        "q_last_top1": last,
        "q_best_top1": best[1],
        "q_best_step": best[0],
        "recovered": recovered(before, last, p_top1),
        "evaluations": [{"step": step, "q_top1": top1} for step, top1 in history],
        "block_errors": [error._asdict() for error in block_errors],
        "model": spec.teacher.model,
        "dataset": settings.dataset_name(e.dataset, e.data_dir) if e.enabled else None,
        "weight_bits": spec.quant.weight_bits,
        "act_bits": spec.quant.act_bits,
        "first_last_bits": spec.quant.first_last_bits,
        "places": spec.quant.places,
        "layer_bits": dict(layer_bits),
        "steps": spec.game.steps,
        "calibrated": bool(spec.calibration.images),
        "seed": spec.seed,
        "seconds": round(seconds, 1),
        "bytes": size,
        "sha256": digest,
        "command": command,
        "format_version": FORMAT_VERSION,
        "versions": versions(PACKAGES),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
    }


def describe_teacher(spec: Settings, p_top1: float | None) -> str:
    """Return a line on P: its network, its file and its accuracy."""
    p = spec.teacher
    measured = "not evaluated" if p_top1 is None else f"top-1 {p_top1:.2f} %"
    source = hub.source(p.path) or "given"
    return f"P: {p.model}, {p.num_classes} classes, {source}: {measured}"


def warn_of_teacher(spec: Settings, p_top1: float) -> str | None:
    """Return a warning if P is much worse than the configuration expects, or None."""
    p = spec.teacher
    if p_top1 >= p.expected_top1 - FAR_BELOW:
        return None
    return (
        f"WARNING: P reaches {p_top1:.2f} %, teacher.expected_top1 is"
        f" {p.expected_top1:.2f} %. The usual cause is a wrong normalisation:"
        f" check teacher.mean={p.mean} and teacher.std={p.std}. Training goes on"
        " with this P."
    )


def describe_game(assembly: Assembly, seconds: float, devices: Sequence) -> str:
    """Return a line on the bits, the steps and the time that they take."""
    g, q = assembly.spec.game, assembly.spec.quant
    bits = settings.bits_of(q)
    trains = f"Q trains from step {g.warmup_steps}"
    if g.warmup_steps == g.steps:
        trains = "Q does not train in them"
    return (
        f"Q: {bits}, {g.steps} steps of batch"
        f" {assembly.batch_size} on {len(devices)} x {devices[0].device_kind}:"
        f" {g.observe_steps} observe ranges, {trains};"
        f" about {duration(seconds)} plus the evaluations"
    )


def describe_reconstruction(spec: Settings, blocks: int, kept: int) -> str:
    """Return a line on the reconstruction; `kept` is the bytes of its images."""
    r = spec.reconstruction
    return (
        f"reconstruction: {blocks} blocks, each with {r.iterations} iterations on"
        f" batches of {r.batch_size} from {r.images:,} images, which take up to"
        f" {kept / 2**30:.1f} GiB"
    )


def duration(seconds: float) -> str:
    """Format a duration, such as '40 s', '5 min' or '3.2 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.{1 if milliseconds >= 1 else 2}f} ms"


def _export_rows(exported: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield a row of the table for every exported file."""
    for made in exported["files"].values():
        top1 = made["top1"]
        is_q = "rounded_again" not in made  # only files in integers count it
        smaller = exported["float32_bytes"] / made["bytes"]
        ours, float32 = (
            of["1"] for of in (made["latency_ms"], exported["float32_latency_ms"])
        )
        faster = "slower" if ours > float32 else "faster"
        same = 100 * made["same_class"]
        text = (
            f"{smaller:.1f} x smaller, same class as Q {same:.1f} %"
            f" of {made['images']:,}\n"
            f"{_ms(ours)} an image, float32 {_ms(float32)}: {faster}"
        )
        if layer := made.get("worst_layer"):
            text += (
                f"\n{made['q_top1'] - top1:.1f} points below Q, most by {layer}:"
                f" export.float_layers={layer} keeps it in float"
            )
        name = Path(made["file"]).name
        yield (
            name.removeprefix("quantized."),
            "as Q" if is_q else tables.percent(top1),
            text,
        )


def table(
    summary: dict[str, Any], file: Path, exported: Mapping[str, Any] | None = None
) -> str:
    """Return the final table of a run, at most 80 columns wide, and the file's path.

    Args:
      summary: the contents of summary.json.
      file: the quantized file.
      exported: the contents of export.json, if there is one.
    """
    percent = tables.percent
    bits = settings.bits_label(*(summary.get(key, 0) for key in _BITS))
    steps, best = summary["steps"], summary["q_best_step"]
    errors, file_of = summary.get("block_errors"), f"step {steps}"
    if errors:
        file_of = f"{len(errors)} blocks reconstructed from step {steps}"
    elif summary.get("calibrated"):
        file_of = f"calibrated after step {steps}"
    share = summary["recovered"]
    rows = [
        ("P, full precision", percent(summary["p_top1"]), "the teacher"),
        ("Q before", percent(summary["q_before_top1"]), "P's weights, quantized"),
        ("Q last", percent(summary["q_last_top1"]), f"of the file, {file_of}"),
        (
            "Q best",
            percent(summary["q_best_top1"]),
            f"best-on-test, step {best or '-'}",
        ),
        ("recovered", percent(share and 100 * share), "(last-before)/(P-before)"),
        *(_export_rows(exported) if exported else ()),
    ]
    measured = f"on {summary['dataset']}" if summary["dataset"] else "not evaluated"
    caption = (
        f"{measured}, seed {summary['seed']}, {duration(summary['seconds'])},"
        f" {summary['bytes']:,} bytes in"
    )
    title = f"{summary['model']} at {bits}, no real image used"
    head = ("", "top-1", "")
    # The path is copied from there, so that it must not be folded.
    return f"{tables.to_text(title, head, rows, 'lrl', caption=caption)}\n{file}"
