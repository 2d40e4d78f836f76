"""Prints how long exported files take on ONNX Runtime, as shares of the float32 file.

    PYTHONPATH=. .venv/bin/python tests/tools/measure_integer_files.py [MODEL ...]

Each network has filled weights, W8A8 and W4A4. Its integer files, the float32 file and
the float32 file after ONNX Runtime's own static quantizer take one image in turns, with
one thread and with two. A share is of the medians; in brackets, of the minima. It takes
about 4 minutes on 2 cores.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime import quantization

from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_integer_onnx, to_onnx
from tests import quantized

# Network -> image, classes, and the largest share with one thread and with two.
MODELS = {
    "resnet18": ((224, 224, 3), 1000, 0.45, 0.45),
    "resnet50": ((224, 224, 3), 1000, 0.45, 0.45),
    "mobilenetv2_w1": ((224, 224, 3), 1000, 0.65, 0.72),
    "resnet20": ((28, 28, 1), 10, 0.65, 0.65),
    "mobilenetv2_small": ((28, 28, 1), 10, 0.65, 0.65),
}
OF_STATIC = 1.05  # largest share of the static quantizer's file
BITS = (8, 4)
SECONDS = 3.0  # that each file of a row is measured


def session(model, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"]
    )


class Reader(quantization.CalibrationDataReader):
    def __init__(self, images):
        self._left = [{"images": image[None]} for image in images]

    def get_next(self):
        return self._left.pop() if self._left else None


def statically_quantized(model, images, folder):
    """The float32 model as ONNX Runtime's static quantizer makes it."""
    before, after = folder / "float32.onnx", folder / "static.onnx"
    onnx.save(model, before)
    quantization.quantize_static(
        before,
        after,
        Reader(images),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return after.read_bytes()


def milliseconds(sessions, image):
    """Medians and minima of calls that take turns."""
    seconds = {name: [] for name in sessions}
    for each in sessions.values():
        each.run(None, {"images": image})
    until = time.perf_counter() + SECONDS * len(sessions)
    while time.perf_counter() < until:
        for name, each in sessions.items():
            begun = time.perf_counter()
            each.run(None, {"images": image})
            seconds[name].append(time.perf_counter() - begun)
    return {
        name: (1000 * np.median(found), 1000 * min(found))
        for name, found in seconds.items()
    }


def rows(name, folder):
    shape, classes, *most = MODELS[name]
    means = (0.5,) * shape[-1]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, *shape)).astype(np.float32)
    models, static = {}, None
    for bits in BITS:
        info = NetworkInfo(name, classes, shape, means, means, bits, bits)
        file = quantized.save(
            folder / "quantized.safetensors", info, quantized.filled(info), images
        )
        network = quantized_file.load_quantized(file)
        made = to_integer_onnx(network, OnnxOptions(), images).model
        models[f"W{bits}A{bits}"] = made.SerializeToString()
        if static is None:
            float32 = to_onnx(network, OnnxOptions(), quantized=False)
            static = statically_quantized(float32, images, folder)
            models["float32"] = float32.SerializeToString()
    models["static"] = static
    for threads, bound in zip((1, 2), most, strict=True):
        sessions = {key: session(model, threads) for key, model in models.items()}
        found = milliseconds(sessions, images[:1])
        cells = [name, threads, f"{found['float32'][0]:.2f}", f"{bound:.2f}"]
        for key in ("W8A8", "W4A4", "static"):
            by_median, by_least = np.divide(found[key], found["float32"])
            cells.append(f"{by_median:.2f} ({by_least:.2f})")
        slowest = max(found[f"W{bits}A{bits}"][1] for bits in BITS)
        cells.append(f"{slowest / found['static'][1]:.2f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main(names):
    heads = ["network", "threads", "float32, ms", "at most"]
    heads += ["W8A8", "W4A4", "static quantizer", f"of static, at most {OF_STATIC}"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows(name, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
