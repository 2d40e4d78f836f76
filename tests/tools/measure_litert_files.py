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

from adadfq_jax.deploy import quantized_file, verify
from adadfq_jax.deploy.litert_file import to_litert
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_integer_onnx
from adadfq_jax.evaluation.evaluator import normalise
from tests import quantized

MODELS = ("resnet20", "mobilenetv2_small")
BITS = (8, 4)
SECONDS = 6.0
HEAD = (
    *("network", "Q", "integer file", "LiteRT", "same class as Q"),
    *("as the integer file", "ONNX Runtime, ms", "LiteRT, ms"),
)


def single_threaded(integer, litert):
    """Both files as functions of one image."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        integer, options, providers=["CPUExecutionProvider"]
    )
    call = Interpreter(model_content=litert, num_threads=1).get_signature_runner()
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


def measure(name, bits, folder, images, ranged_on):
    file = folder / "quantized.safetensors"
    quantized.save_fashion_mnist(file, bits, bits, model=name)
    network, options = quantized_file.load_quantized(file), OnnxOptions()
    model = to_integer_onnx(network, options, ranged_on).model
    litert = to_litert(model, options, network.image_shape)
    integer = model.SerializeToString()
    classes = [
        verify.all_logits(run, images).argmax(-1)
        for run in (
            lambda batch: np.asarray(network(batch)),
            verify.onnx_runner(integer, options.images),
            verify.litert_runner(litert),
        )
    ]
    labels = quantized.fashion_mnist(10_000).labels
    row(
        f"{name} W{bits}A{bits}",
        *(f"{100 * np.mean(found == labels):.2f}" for found in classes),
        *(f"{100 * np.mean(classes[2] == classes[at]):.2f} %" for at in (0, 1)),
        *milliseconds(single_threaded(integer, litert), images[:1]),
    )


def main():
    images = quantized.fashion_mnist_images(10_000)
    pixels = verify.random_images(images.shape[1:]).pixels
    ranged_on = np.asarray(normalise(pixels, quantized.MEAN, quantized.STD))
    row(*HEAD)
    print("|---" * len(HEAD) + "|")
    for name in MODELS:
        for bits in BITS:
            with tempfile.TemporaryDirectory() as folder:
                measure(name, bits, Path(folder), images, ranged_on)


if __name__ == "__main__":
    main()
