"""Exports of a `quantized.safetensors`, each of them checked before it is written."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adadfq_jax.deploy import quantized_file, verify
from adadfq_jax.deploy.encodings import check_scheme, encodings, state_dict
from adadfq_jax.deploy.model_card import CARD_FILE, model_card
from adadfq_jax.deploy.network import NetworkInfo, QuantizedNetwork
from adadfq_jax.deploy.stablehlo_file import PLATFORMS, to_stablehlo
from adadfq_jax.errors import ExportError, InputError, short
from adadfq_jax.evaluation.evaluator import normalise, to_pixels
from adadfq_jax.network import Function, Graph
from adadfq_jax.runtime import extras, files
from adadfq_jax.runtime.files import sha256
from adadfq_jax.runtime.progress import log
from adadfq_jax.runtime.run_files import EXPORT_FILE, QUANTIZED_FILE
from adadfq_jax.runtime.versions import versions
from adadfq_jax.settings import Export

ONNX_FILE = "quantized.onnx"
INTEGER_FILE = "quantized.integer.onnx"
STABLEHLO_FILE = "quantized.stablehlo"
LITERT_FILE = "quantized.tflite"
ENCODINGS_FILE = "encodings.json"
STATE_DICT_FILE = "quantized.weights.safetensors"
INTEGER = "integer"  # the integer file's kind
LITERT = "litert"  # the .tflite file's kind, and its target
_LEAVES_OUT = {INTEGER: "export.integer=False", LITERT: "export.target=onnxruntime"}
MOST_LOST = 0.5  # points of top-1 below Q beyond which the cause is looked for
_PACKAGES = ("jax", "flax", "onnx", "onnxruntime", "numpy")


def missing_for_onnx() -> InputError | None:
    """Return the error if a package that ONNX files need is missing, else None."""
    if extras.are_installed("onnx", "onnxruntime"):
        return None
    return extras.missing(
        "an ONNX file", "onnx and onnxruntime", "onnx", "or export.onnx=False"
    )


def missing_for_litert() -> InputError | None:
    """Return the error if a package that a .tflite file needs is missing, else None."""
    if extras.are_installed("litert_converter", "ai_edge_litert"):
        return None
    return InputError(
        f"{LITERT_FILE} needs litert-converter and ai-edge-litert: pip install"
        " 'adadfq_jax[litert]' && pip install --no-deps litert-converter, or"
        " export.target=onnxruntime",
        "export.target",
    )


def _onnx_options(options: Export) -> Any:
    from adadfq_jax.deploy import onnx_file  # here: onnx is an optional extra

    least_bits = 8 if options.uint8_only else 4 if options.target == "openvino" else 2
    return onnx_file.OnnxOptions(options.layout, options.pixels, least_bits)


class _Program(NamedTuple):
    """Q for one runtime.

    Attributes:
      kind: its key in export.json.
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
    network: QuantizedNetwork, options: Export, *, quantized: bool = True
) -> Iterator[_Program]:
    """Yield the programs that the options ask for, each made when it is needed."""
    if options.onnx:
        from adadfq_jax.deploy import onnx_file  # here: onnx is an optional extra

        wanted = _onnx_options(options)
        proto = onnx_file.to_onnx(network, wanted, quantized=quantized)
        model = proto.SerializeToString()
        run = verify.onnx_runner(model, wanted.images)
        yield _Program("onnx", ONNX_FILE, model, run, options.layout)
    if options.stablehlo:
        content = to_stablehlo(network, pixels=options.pixels, quantized=quantized)
        run = verify.stablehlo_runner(content)
        yield _Program("stablehlo", STABLEHLO_FILE, content, run, "NHWC")


class _IntegerFile(NamedTuple):
    """The integer file of a network.

    Attributes:
      model: the file.
      content: its bytes.
      run: runs it on ONNX Runtime.
      rounded_again: number of the kernels' channels whose codes are not Q's.
    """

    model: Any
    content: bytes
    run: verify.Run
    rounded_again: int


def _integer_file(
    network: QuantizedNetwork,
    options: Export,
    images: np.ndarray,
    float_layers: Collection[str],
) -> _IntegerFile:
    """Make the integer file; `images` give the ranges that Q does not have."""
    from adadfq_jax.deploy import onnx_file
    from adadfq_jax.deploy.onnx_integer import Choices

    wanted, own = _onnx_options(options), options.target == "symmetric"
    choices = Choices(symmetric=own, float_biases=own, float_layers=float_layers)
    made = onnx_file.to_integer_onnx(network, wanted, images, choices)
    content = made.model.SerializeToString()
    run = verify.onnx_runner(content, wanted.images)
    return _IntegerFile(made.model, content, run, made.rounded_again)


def _float_layers(graph: Graph, options: Export) -> list[str]:
    """Return the kernels that stay in float in the integer file.

    Raises:
      InputError: the network has no such kernel.
    """
    known = {entry.variable for entry in graph.kernels}
    names = [name.strip() for name in options.float_layers.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(
                f"export.float_layers={short(name)}: the network has no such kernel;"
                f" its kernels are {short(', '.join(sorted(known)), 300)}"
            )
    return names


def check_names(
    options: Export, info: NetworkInfo, function: Function, graph: Graph
) -> None:
    """Refuse names in the options that a network does not have, before it is trained.

    Raises:
      InputError: it has no such kernel, or no state dict with such names.
    """
    _float_layers(graph, options)
    if options.state_dict:
        check_scheme(info, function, options.state_dict)


def _worst_layer(
    network: QuantizedNetwork,
    options: Export,
    ranged_on: np.ndarray,
    given: np.ndarray,
    ours: np.ndarray,
) -> str:
    """Find the kernel that brings the integer file nearest to Q if it stays in float.

    Args:
      network: Q.
      options: see `settings.Export`.
      ranged_on: see `_integer_file`.
      given: images that the file takes; the first `verify.UNLABELLED_IMAGES` are used.
      ours: Q's logits for the images.
    """
    given, ours = (x[: verify.UNLABELLED_IMAGES] for x in (given, ours))
    kept = _float_layers(network.graph, options)

    def error(name: str) -> float:
        file = _integer_file(network, options, ranged_on, [*kept, name])
        return float(np.square(verify.all_logits(file.run, given) - ours).mean())

    return min(dict.fromkeys(e.variable for e in network.graph.kernels), key=error)


def _integer_programs(
    network: QuantizedNetwork, options: Export, file: _IntegerFile
) -> Iterator[_Program]:
    """Yield the integer file, and its form for LiteRT if that is the target."""
    yield _Program(INTEGER, INTEGER_FILE, file.content, file.run, options.layout)
    if options.target == LITERT:
        from adadfq_jax.deploy.litert_file import to_litert  # here: it needs onnx

        wanted = _onnx_options(options)
        content = to_litert(file.model, wanted, network.image_shape)
        run = verify.litert_runner(content)
        yield _Program(LITERT, LITERT_FILE, content, run, "NHWC")


def _in_integers(
    network: QuantizedNetwork,
    options: Export,
    ranged_on: np.ndarray,
    given: np.ndarray,
    ours: np.ndarray,
    images: verify.Images,
    own: verify.Differences,
) -> Iterator[tuple[_Program, dict[str, Any]]]:
    """Make and measure the programs in integers; yield each with its entry.

    Their tensors have 8 bits where Q's have others, so that they are not Q. One is left
    out where its runtime's integers do not give what the integer file's numbers say.
    """
    kept = _float_layers(network.graph, options)
    file = _integer_file(network, options, ranged_on, kept)
    wanted, part = _onnx_options(options), given[: verify.UNLABELLED_IMAGES]
    plain = verify.onnx_runner(file.content, wanted.images, optimized=False)
    expected = verify.all_logits(plain, part)
    for program in _integer_programs(network, options, file):
        theirs = verify.all_logits(program.run, given)
        unlabelled = images._replace(labels=None)
        near = verify.compare(expected, theirs[: len(part)], unlabelled, own)
        try:
            verify.require_agreement(program.file, near)
        except ExportError as error:  # the other files compute what Q does
            log.warning(f"{error}; {_LEAVES_OUT[program.kind]} leaves it out")
            continue
        found = verify.compare(ours, theirs, images, own)
        found["rounded_again"] = file.rounded_again
        if program.kind == INTEGER:
            top1, is_known = found["top1"], found["top1"] is not None
            is_far = is_known and found["q_top1"] - top1 > MOST_LOST
            asked = network, options, ranged_on, given, ours
            found["worst_layer"] = _worst_layer(*asked) if is_far else None
        yield program, {**found, "latency_ms": verify.latency_ms(program.run, given)}


def _float32_record(
    network: QuantizedNetwork, options: Export, given: np.ndarray
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
    for name in (
        *(ONNX_FILE, INTEGER_FILE, STABLEHLO_FILE, LITERT_FILE, ENCODINGS_FILE),
        *(STATE_DICT_FILE, EXPORT_FILE, CARD_FILE),
    ):
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


def _ranging_images(network: QuantizedNetwork) -> np.ndarray:
    """Make random images in normalised space, for ranges where there is no G.

    Where P's normalisation is not known, half of the images are pixels, and half have
    the mean and variance of G's images.
    """
    images = verify.random_images(network.image_shape).pixels
    found = np.array(normalise(jnp.asarray(images), network.mean, network.std))
    if network.info.is_normalised:
        return found
    half, rng = len(found) // 2, np.random.default_rng(1)
    found[half:] = np.clip(rng.normal(size=found[half:].shape), -4, 4)
    return found


def export_network(
    network: QuantizedNetwork,
    folder: Path,
    options: Export,
    generated: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write a network's own file into a folder, and the files of `write_exports`.

    They take the place of an earlier export there, all of them, or none after an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as made:
        file = network.save(Path(made) / QUANTIZED_FILE)
        record = write_exports(
            file, Path(made), options, function=network.function, generated=generated
        )
        remove_exports(folder)
        # export.json last: it marks the export as whole.
        for path in sorted(Path(made).iterdir(), key=lambda p: p.name == EXPORT_FILE):
            path.replace(folder / path.name)
    return record


def write_exports(
    file: Path,
    folder: Path,
    options: Export,
    images: verify.Images | None = None,
    run: Mapping[str, Any] | None = None,
    function: Function | None = None,
    generated: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write the programs that the options ask for, export.json and model_card.md.

    Each program is first run and compared with Q: one that computes what Q does on the
    first `verify.SAMPLE` of `images`, one in integers, which is not Q, on all.

    Args:
      file: a quantized.safetensors.
      folder: an existing folder for the files.
      options: see `settings.Export`.
      images: images to compare on; None means random images.
      run: describes the run that made the file, for the card, see `model_card`.
      function: the network; None means the package's network that the file names.
      generated: images of G in normalised space, which give the integer file the
        ranges that Q does not have; None means random images.

    Returns:
      The contents of export.json.

    Raises:
      InputError: the file cannot be read, the network has an operation without an
        ONNX rule or none of LiteRT, or a package that a file needs is not installed.
      ExportError: a program does not compute what Q does; no file is written.
    """
    missing = missing_for_onnx() if options.onnx else None
    missing = missing or (missing_for_litert() if options.target == LITERT else None)
    if missing:
        raise missing
    network = quantized_file.load_quantized(file, function)
    images = images or verify.random_images(network.image_shape)
    in_integers = options.onnx and options.integer
    if not in_integers:
        images = images.first(verify.SAMPLE)
    normalised = np.asarray(
        normalise(jnp.asarray(images.pixels), network.mean, network.std)
    )
    given = images.pixels if options.pixels else normalised
    ours = verify.all_logits(
        lambda batch: np.asarray(network(jnp.asarray(batch))), normalised
    )
    own = verify.own_differences(network, normalised, ours)
    record = {**_base_record(file), "options": dataclasses.asdict(options)}
    contents: dict[str, bytes] = {}
    if options.state_dict:
        contents[STATE_DICT_FILE] = state_dict(network, options.state_dict)

    def note(kind: str, name: str, content: bytes, layout: str, found: Any) -> None:
        contents[name] = content
        record["files"][kind] = {
            "file": name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "input": f"{'uint8 pixels' if options.pixels else 'float32'} {layout}",
            **found,
        }

    few = slice(verify.SAMPLE)
    for kind, name, content, runner, layout in _programs(network, options):
        theirs = verify.all_logits(runner, given[few])
        found = verify.compare(ours[few], theirs, images.first(verify.SAMPLE), own)
        verify.require_agreement(name, found)
        found["latency_ms"] = verify.latency_ms(runner, given)
        note(kind, name, content, layout, found)
    if "stablehlo" in record["files"]:
        record["files"]["stablehlo"]["platforms"] = PLATFORMS
    record.update(_float32_record(network, options, given))
    if in_integers:
        if generated is None:
            generated = _ranging_images(network)
        ranged_on = (
            to_pixels(generated, network.mean, network.std)
            if options.pixels
            else generated
        )
        for program, found in _in_integers(
            network, options, ranged_on, given, ours, images, own
        ):
            found["float32_latency_ms"] = record["float32_latency_ms"]
            note(program.kind, program.file, program.content, program.layout, found)
    for name, content in contents.items():
        files.write_bytes(folder / name, content)
    files.write_text(
        folder / CARD_FILE, model_card(network.info, network.graph, record, run)
    )
    files.write_json(folder / ENCODINGS_FILE, encodings(network))
    files.write_json(folder / EXPORT_FILE, record)  # last: it marks the export as whole
    return record
