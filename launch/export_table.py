"""Prints the README's table of exported files: the embedded P at 8, 4 and 3 bits.

    PYTHONPATH=. .venv/bin/python launch/export_table.py [FOLDER]

Each Q has P's weights and ranges calibrated on 500 of the images, without a game, and
is exported as by --mode=export, on all 10,000 images. Latencies mean something on an
otherwise idle machine alone. The files stay in FOLDER (runs/exports).
"""

import sys
from pathlib import Path

from adadfq_jax.deploy import check, write
from tests import quantized

BITS = (8, 4, 3)
HEAD = ("file", "bytes", "times smaller", "top-1", "Q's", "ms, 1 image", "ms, 64")


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def milliseconds(latency):
    return [f"{latency[count]:.1f}" for count in ("1", "64")]


def main(folder):
    images = check.evaluation_images(quantized.fashion_mnist(), "fashion_mnist test")
    row("bits", *HEAD)
    print("|---" * (len(HEAD) + 1) + "|")
    for bits in BITS:
        name = f"W{bits}A{bits}"
        workdir = folder / name
        workdir.mkdir(parents=True, exist_ok=True)
        file = workdir / "quantized.safetensors"
        quantized.save_fashion_mnist(file, bits, bits)
        record = write.write_exports(file, workdir, write.Options(), images)
        float32 = record["float32_bytes"]
        made = record["files"]
        size, top1 = record["bytes"], f"{made['onnx']['q_top1']:.2f}"
        row(name, file.name, f"{size:,}", f"{float32 / size:.1f}", top1, top1, "-", "-")
        for found in made.values():
            size = found["bytes"]
            cells = [found["file"], f"{size:,}", f"{float32 / size:.1f}"]
            cells += [f"{found['top1']:.2f}", top1, *milliseconds(found["latency_ms"])]
            row(name, *cells)
    latency = milliseconds(made["onnx"]["float32_latency_ms"])
    row("float32", "ONNX", f"{float32:,}", "1.0", "-", "-", *latency)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/exports"))
