"""Exports of a `quantized.safetensors`, each of them checked before it is written."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adadfq_jax.deploy import quantized_file, verify
from adadfq_jax.deploy.model_card import CARD_FILE, model_card
from adadfq_jax.deploy.network import QuantizedNetwork
from adadfq_jax.deploy.stablehlo_file import PLATFORMS, to_stablehlo
from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.evaluator import normalise
from adadfq_jax.network import Function
from adadfq_jax.runtime import extras, files
from adadfq_jax.runtime.files import sha256
from adadfq_jax.runtime.run_files import EXPORT_FILE, QUANTIZED_FILE
from adadfq_jax.runtime.versions import versions

ONNX_FILE = "quantized.onnx"
STABLEHLO_FILE = "quantized.stablehlo"
_PACKAGES = ("jax", "flax", "onnx", "onnxruntime", "numpy")


def missing_for_onnx() -> InputError | None:
    """Return the error if a package that ONNX files need is missing, else None."""
    if extras.are_installed("onnx", "onnxruntime"):
        return None
    return extras.missing(
        "an ONNX file", "onnx and onnxruntime", "onnx", "or export.onnx=False"
    )


class Options(NamedTuple):
    """Files to write, and the images that they take.

    Attributes:
      onnx: whether to write an ONNX file.
      stablehlo: whether to write a StableHLO file.
      layout: of the ONNX file's images, see `onnx_file.OnnxOptions`.
      pixels: whether both files take uint8 pixels, see `onnx_file.OnnxOptions`.
      uint8_only: see `onnx_file.OnnxOptions`.
    """

    onnx: bool = True
    stablehlo: bool = True
    layout: str = "NHWC"
    pixels: bool = False
    uint8_only: bool = False


class _Program(NamedTuple):
    """Q for one runtime.

    Attributes:
      kind: 'onnx' or 'stablehlo'.
      file: name of its file.
      content: of the file.
      run: runs it.
      layout: of its images.
    """

    kind: str
    file: str
    content: bytes
    run: verify.Run
    layout: str


def _programs(
    network: QuantizedNetwork, options: Options, *, quantized: bool = True
) -> Iterator[_Program]:
    """Yield the programs that the options ask for, each made when it is needed."""
    if options.onnx:
        from adadfq_jax.deploy import onnx_file  # here: onnx is an optional extra

        wanted = onnx_file.OnnxOptions(
            options.layout, options.pixels, options.uint8_only
        )
        proto = onnx_file.to_onnx(network, wanted, quantized=quantized)
        model = proto.SerializeToString()
        run = verify.onnx_runner(model, wanted.images)
        yield _Program("onnx", ONNX_FILE, model, run, options.layout)
    if options.stablehlo:
        content = to_stablehlo(network, pixels=options.pixels, quantized=quantized)
        run = verify.stablehlo_runner(content)
        yield _Program("stablehlo", STABLEHLO_FILE, content, run, "NHWC")


def _float32_record(
    network: QuantizedNetwork, options: Options, given: np.ndarray
) -> dict[str, Any]:
    """Measure the network in float32, in the first format that the options ask for."""
    program = next(_programs(network, options, quantized=False))
    return {
        "float32_kind": program.kind,
        "float32_bytes": len(program.content),
        "float32_latency_ms": verify.latency_ms(program.run, given),
    }


def _base_record(file: Path) -> dict[str, Any]:
    """Return the first entries of export.json, its `files` still empty."""
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "files": {},
        "versions": versions(_PACKAGES),
    }


def are_whole(record: Mapping[str, Any], folder: Path) -> bool:
    """Tell whether a folder has all files of an export.json, unchanged."""
    return all(
        (folder / made["file"]).is_file()
        and sha256(folder / made["file"]) == made.get("sha256")
        for made in record.get("files", {}).values()
    )


def remove_exports(folder: Path) -> None:
    """Remove the files of `write_exports` from a folder."""
    for name in (ONNX_FILE, STABLEHLO_FILE, EXPORT_FILE, CARD_FILE):
        (folder / name).unlink(missing_ok=True)


def write_card(
    file: Path,
    folder: Path,
    run: Mapping[str, Any] | None,
    function: Function | None = None,
) -> None:
    """Write model_card.md alone, without files for other runtimes.

    A card that has the same text already is not written again.

    Args:
      file: a quantized.safetensors.
      folder: an existing folder for the card.
      run: describes the run that made the file, see `model_card`.
      function: the network; None means the package's network that the file names.

    Raises:
      InputError: the file cannot be read.
    """
    network = quantized_file.load_quantized(file, function)
    card = model_card(network.info, network.graph, _base_record(file), run)
    there = folder / CARD_FILE
    if not there.exists() or there.read_text(errors="replace") != card:
        files.write_text(there, card)


def export_network(
    network: QuantizedNetwork, folder: Path, options: Options
) -> dict[str, Any]:
    """Write a network's own file into a folder, then the files of `write_exports`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = network.save(folder / QUANTIZED_FILE)
    return write_exports(file, folder, options, function=network.function)


def write_exports(
    file: Path,
    folder: Path,
    options: Options,
    images: verify.Images | None = None,
    run: Mapping[str, Any] | None = None,
    function: Function | None = None,
) -> dict[str, Any]:
    """Write quantized.onnx, quantized.stablehlo, export.json and model_card.md.

    Each program is first run on `images` and compared with Q.

    Args:
      file: a quantized.safetensors.
      folder: an existing folder for the files.
      options: see `Options`.
      images: images to compare on; None means random images.
      run: describes the run that made the file, for the card, see `model_card`.
      function: the network; None means the package's network that the file names.

    Returns:
      The contents of export.json.

    Raises:
      InputError: the file cannot be read, the network has an operation without an
        ONNX rule, or a package that ONNX files need is not installed.
      ExportError: a program does not compute what Q does; no file is written.
    """
    missing = missing_for_onnx() if options.onnx else None
    if missing:
        raise missing
    network = quantized_file.load_quantized(file, function)
    images = images or verify.random_images(network.image_shape)
    normalised = np.asarray(
        normalise(jnp.asarray(images.pixels), network.mean, network.std)
    )
    given = images.pixels if options.pixels else normalised
    ours = verify.all_logits(
        lambda batch: np.asarray(network(jnp.asarray(batch))), normalised
    )
    own = verify.own_differences(network, normalised, ours)
    record = {**_base_record(file), "options": options._asdict()}
    contents: dict[str, bytes] = {}
    for kind, name, content, runner, layout in _programs(network, options):
        found = verify.compare(ours, verify.all_logits(runner, given), images, own)
        verify.require_agreement(name, found)
        contents[name] = content
        record["files"][kind] = {
            "file": name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "input": f"{'uint8 pixels' if options.pixels else 'float32'} {layout}",
            "latency_ms": verify.latency_ms(runner, given),
            **found,
        }
    if "stablehlo" in record["files"]:
        record["files"]["stablehlo"]["platforms"] = PLATFORMS
    record.update(_float32_record(network, options, given))
    for name, content in contents.items():
        files.write_bytes(folder / name, content)
    files.write_text(
        folder / CARD_FILE, model_card(network.info, network.graph, record, run)
    )
    files.write_json(folder / EXPORT_FILE, record)  # last: it marks the export as whole
    return record
