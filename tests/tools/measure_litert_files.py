"""Prints Q, the integer file and the file for LiteRT: top-1, agreement, latency.

    PYTHONPATH=. .venv/bin/python tests/tools/measure_litert_files.py

Both embedded Ps at W8A8 and W4A4, with P's weights and ranges calibrated on 500 of the
images, without a game; open ranges come from random images. Top-1 is on all 10,000 test
images. The two files take one image in turns, with one thread each.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter

from adadfq_jax.deploy import export, verify
from tests import quantized

MODELS = ("resnet20", "mobilenetv2_small")
BITS = (8, 4)
SECONDS = 6.0
HEAD = (
    *("network", "Q", "integer file", "LiteRT", "same class as Q"),
    *("ONNX Runtime, ms", "LiteRT, ms"),
)


def single_threaded(folder):
    """Both files as functions of one image."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / export.INTEGER_FILE, options, providers=["CPUExecutionProvider"]
    )
    interpreter = Interpreter(str(folder / export.LITERT_FILE), num_threads=1)
    call = interpreter.get_signature_runner()
    return lambda x: session.run(None, {"images": x}), lambda x: call(images=x)


def milliseconds(runners, image):
    """Medians of calls that take turns."""
    seconds = [[] for _ in runners]
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        for run, found in zip(runners, seconds, strict=True):
            begun = time.perf_counter()
            run(image)
            found.append(time.perf_counter() - begun)
    return [f"{1000 * np.median(found):.2f}" for found in seconds]


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main():
    images = verify.evaluation_images(quantized.fashion_mnist(), "fashion_mnist test")
    image = quantized.fashion_mnist_images(1)
    row(*HEAD)
    print("|---" * len(HEAD) + "|")
    for model in MODELS:
        for bits in BITS:
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                file = folder / "quantized.safetensors"
                quantized.save_fashion_mnist(file, bits, bits, model=model)
                options = export.Options(stablehlo=False, target="litert")
                files = export.write_exports(file, folder, options, images)["files"]
                found = files["litert"]
                row(
                    f"{model} W{bits}A{bits}",
                    *(f"{found['q_top1']:.2f}", f"{files['integer']['top1']:.2f}"),
                    *(f"{found['top1']:.2f}", f"{100 * found['same_class']:.2f} %"),
                    *milliseconds(single_threaded(folder), image),
                )


if __name__ == "__main__":
    main()
