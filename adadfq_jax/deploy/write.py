"""Every file that is made of a `quantized.safetensors`, each checked first."""

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import adadfq_jax
from adadfq_jax import export, files
from adadfq_jax.deploy import check
from adadfq_jax.deploy.card import CARD_FILE, model_card
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_onnx
from adadfq_jax.deploy.stablehlo_file import PLATFORMS, to_stablehlo
from adadfq_jax.evaluate import normalise
from adadfq_jax.workdir import EXPORT_FILE

ONNX_FILE = "quantized.onnx"
STABLEHLO_FILE = "quantized.stablehlo"
_PACKAGES = ("jax", "flax", "onnx", "onnxruntime", "numpy")


class Options(NamedTuple):
    """Which files, and how they take images: see `OnnxOptions`."""

    onnx: bool = True
    stablehlo: bool = True
    layout: str = "NHWC"
    pixels: bool = False
    uint8_only: bool = False


def _described(file: Path) -> dict[str, Any]:
    """What export.json begins with."""
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "files": {},
        "versions": {
            "adadfq_jax": adadfq_jax.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
    }


def remove_exports(folder: Path) -> None:
    """Removes what `write_exports` left in a folder."""
    for name in (ONNX_FILE, STABLEHLO_FILE, EXPORT_FILE, CARD_FILE):
        (folder / name).unlink(missing_ok=True)


def write_card(file: Path, folder: Path, run: Mapping[str, Any] | None) -> None:
    """Writes model_card.md alone, without files for other runtimes.

    One that says the same already is left as it is.

    Args:
      file: a quantized.safetensors.
      folder: where the card goes; it is there.
      run: of the run that made the file, see `model_card`.

    Raises:
      InputError: the file cannot be read.
    """
    card = model_card(export.load_quantized(file).info, _described(file), run)
    there = folder / CARD_FILE
    if not there.exists() or there.read_text(errors="replace") != card:
        files.write_text(there, card)


def write_exports(
    file: Path,
    folder: Path,
    options: Options,
    images: check.Images | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes quantized.onnx, quantized.stablehlo, export.json and model_card.md.

    Each file is first run on `images` and compared with Q.

    Args:
      file: a quantized.safetensors.
      folder: where the files go; it is there.
      options: see `Options`.
      images: to compare on; random ones if None.
      run: of the run that made the file, for the card, see `model_card`.

    Returns:
      The contents of export.json.

    Raises:
      InputError: the file cannot be read, or has an operation that ONNX lacks a rule
        for here.
      ExportError: a file does not compute what Q does; none is written.
    """
    network = export.load_quantized(file)
    images = images or check.random_images(network.image_shape)
    pixels = jnp.asarray(images.pixels)
    normalised = np.asarray(normalise(pixels, network.mean, network.std))

    def run_q(batch: np.ndarray) -> np.ndarray:
        return np.asarray(network(jnp.asarray(batch)))

    ours = check.all_logits(run_q, normalised)
    given = images.pixels if options.pixels else normalised
    onnx_options = OnnxOptions(options.layout, options.pixels, options.uint8_only)
    float32 = to_onnx(network, onnx_options, quantized=False).SerializeToString()
    record = {
        **_described(file),
        "options": options._asdict(),
        "float32_bytes": len(float32),
    }
    contents: dict[str, bytes] = {}

    def add(kind: str, name: str, content: bytes, run: check.Run, layout: str, **more):
        found = check.compare(ours, check.all_logits(run, given), images)
        check.require_agreement(name, found)
        contents[name] = content
        record["files"][kind] = {
            "file": name,
            "bytes": len(content),
            "input": f"{'uint8 pixels' if options.pixels else 'float32'} {layout}",
            "latency_ms": check.latency_ms(run, given),
            **found,
            **more,
        }

    if options.onnx:
        content = to_onnx(network, onnx_options).SerializeToString()
        runners = [
            check.onnx_runner(model, onnx_options.images)
            for model in (content, float32)
        ]
        more = {"float32_latency_ms": check.latency_ms(runners[1], given)}
        add("onnx", ONNX_FILE, content, runners[0], options.layout, **more)
    if options.stablehlo:
        content = to_stablehlo(network, pixels=options.pixels)
        runner = check.stablehlo_runner(content)
        add("stablehlo", STABLEHLO_FILE, content, runner, "NHWC", platforms=PLATFORMS)
    for name, content in contents.items():
        files.write_bytes(folder / name, content)
    files.write_text(folder / CARD_FILE, model_card(network.info, record, run))
    files.write_json(folder / EXPORT_FILE, record)  # last: it says that all are there
    return record
