"""The figures of a device as Markdown that is readable on a terminal, too."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adadfq_jax.runtime import tables

# Numbers -> the dtype of G and P, and the precision of products. JAX's other name of
# 'high' is 'tensorfloat32'.
NUMBERS = {
    "float32": ("float32", "highest"),
    "tf32": ("float32", "high"),
    "bfloat16": ("bfloat16", "default"),
}
REFERENCE = "float32"
# Dense peaks in Tflop/s with these numbers, by a part of JAX's name of the device (data
# sheets of NVIDIA and Google Cloud). A TPU multiplies bfloat16 numbers: a product of
# float32 numbers is six of these, or three in the precision 'high'.
_PEAKS = {
    "H100 PCIe": (51, 378, 756),
    "H100 NVL": (60, 418, 835),
    "H100": (67, 495, 989),
    "H200": (67, 495, 989),
    "A100": (19.5, 156, 312),
    "L4": (30.3, 60, 121),
    "TPU v4": (275 / 6, 275 / 3, 275),
    "TPU v5 lite": (197 / 6, 197 / 3, 197),
    "TPU v5": (459 / 6, 459 / 3, 459),
    "TPU v6 lite": (918 / 6, 918 / 3, 918),
}
_NOTES = """\
A row is a network, its batch, what ran, and the numbers. `step`: the game, a step in a
dispatch; `scan`: many steps in a dispatch; `blocks`: iterations of the reconstruction.
`tf32` is JAX's precision 'high' or 'tensorfloat32'; `bfloat16` is that of G and P, with
products of Q in JAX's default precision. GiB is the program's memory. Compiling is
tracing + XLA. The losses are means over the first steps, G's and Q's; P's logits are on
images of an untrained G. Both are compared with float32."""


def peak_share(device: str, numbers: str, flops_per_second: float) -> float | None:
    """Return the share of a device's peak; None if its peak is not known."""
    for name, peaks in _PEAKS.items():
        if re.search(rf"\b{name}\b", device):
            return flops_per_second / 1e12 / peaks[[*NUMBERS].index(numbers)]
    return None


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table with aligned columns."""
    cells = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *others = (list(map(str.ljust, row, widths)) for row in cells)
    return tables.to_markdown(head, others).rstrip()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _losses_off(found: Mapping[str, Any], case: str) -> str:
    """Return by how much the losses differ from those of the same case in float32."""
    base = found.get(" ".join([*case.split()[:-1], REFERENCE]), {})
    if base == found[case] or "losses" not in base or "losses" not in found[case]:
        return "-"
    pairs = zip(found[case]["losses"].values(), base["losses"].values(), strict=True)
    return ", ".join(f"{100 * abs(own / other - 1):.3g} %" for own, other in pairs)


def _row(found: Mapping[str, Any], case: str) -> list[str]:
    row = found[case]
    speed, memory = row.get("flops_per_second"), row.get("program_bytes")
    return [
        case,
        f"{1e3 / row['steps_per_second']:.2f}",
        f"{row['images_per_second']:.0f}",
        f"{speed / 1e12:.3g}" if speed else "-",
        _percent(row.get("peak_share")),
        f"{memory / 2**30:.2f}" if memory else "-",
        f"{row['trace_seconds']:.0f} + {row['compile_seconds']:.0f}",
        _losses_off(found, case),
        _percent(row.get("logits_off")),
        _percent(row.get("top1_agrees")),
    ]


def _operations(profile: Mapping[str, Any]) -> str:
    shares = sorted(profile["operations"].items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {_percent(share)}" for kind, share in shares)


def document(found: Mapping[str, Any], order: Sequence[str]) -> str:
    """Return all figures as Markdown.

    Args:
      found: 'machine', and 'cases' with the figures by the cases' names.
      order: names of all cases.
    """
    machine, cases = found["machine"], found["cases"]
    done = [c for c in order if c in cases and "failed" not in cases[c]]
    columns = ["measured", "ms a step", "images/s", "Tflop/s", "of peak", "GiB"]
    columns += ["compile, s", "losses off", "P's logits off", "top-1 agrees"]
    peak = max((row["device_peak_bytes"] or 0 for row in cases.values()), default=0)
    used = f"{peak / 2**30:.2f} GiB at most" if peak else "not known here"
    sections = [
        f"# {machine['device']}, JAX {machine['jax']}",
        _NOTES,
        _table(columns, [_row(cases, case) for case in done]),
        f"Memory in use on the device: {used}.",
    ]
    blocks = [
        (
            *(case, block["block"], f"{1e3 / block['iterations_per_second']:.2f}"),
            *(f"{block[when]:.4f}" for when in ("before", "after")),
        )
        for case in done
        for block in cases[case].get("blocks", ())
    ]
    if blocks:
        head = ["measured", "block", "ms an iteration", "error before", "error after"]
        sections += ["## Blocks", _table(head, blocks)]
    lists = {
        "Profiles: operations by their share of the time": [
            f"{case}: device {_percent(profile['busy'])} busy; {_operations(profile)}"
            for case in done
            if (profile := cases[case].get("profile"))
        ],
        "Failed": [
            f"{c}: {row['failed']}" for c, row in cases.items() if c not in done
        ],
        "Not measured: no time": [case for case in order if case not in cases],
    }
    for title, lines in lists.items():
        if lines:
            sections += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(sections) + "\n"
