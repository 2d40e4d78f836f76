"""Prints the README's table of exported files: both embedded Ps at 8, 4 and 3 bits.

    PYTHONPATH=. .venv/bin/python tests/tools/export_table.py [FOLDER]

Each Q has P's weights and ranges calibrated on 500 of the images, without a game, and
is exported as by --mode=export, on all 10,000 images. Latencies mean something on an
otherwise idle machine alone. The files stay in FOLDER (runs/exports).
"""

import sys
from pathlib import Path

from adadfq_jax.deploy import export, verify
from adadfq_jax.settings import Export
from tests import quantized

MODELS = ("resnet20", "mobilenetv2_small")
BITS = (8, 4, 3)
HEAD = ("file", "bytes", "times smaller", "top-1", "Q's", "ms, 1 image", "ms, 64")


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def milliseconds(latency):
    return [f"{latency[count]:.1f}" for count in ("1", "64")]


def rows(model, bits, folder, images):
    name = f"{model} W{bits}A{bits}"
    workdir = folder / name.replace(" ", "-")
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "quantized.safetensors"
    quantized.save_fashion_mnist(file, bits, bits, model=model)
    record = export.write_exports(file, workdir, Export(), images)
    float32, size = record["float32_bytes"], record["bytes"]
    top1 = f"{record['files']['onnx']['q_top1']:.2f}"
    row(name, file.name, f"{size:,}", f"{float32 / size:.1f}", top1, top1, "-", "-")
    for found in record["files"].values():
        size = found["bytes"]
        cells = [found["file"], f"{size:,}", f"{float32 / size:.1f}"]
        cells += [f"{found['top1']:.2f}", top1, *milliseconds(found["latency_ms"])]
        row(name, *cells)
    return record


def main(folder):
    images = verify.evaluation_images(
        quantized.fashion_mnist(10_000), "fashion_mnist test"
    )
    row("network", *HEAD)
    print("|---" * (len(HEAD) + 1) + "|")
    for model in MODELS:
        for bits in BITS:
            record = rows(model, bits, folder, images)
        latency = milliseconds(record["float32_latency_ms"])
        row(
            model,
            "float32 ONNX",
            f"{record['float32_bytes']:,}",
            "1.0",
            "-",
            "-",
            *latency,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/exports"))
