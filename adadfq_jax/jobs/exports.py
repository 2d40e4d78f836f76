"""The job --mode=export: write, check and update the files of a quantized network."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adadfq_jax import evaluation, settings
from adadfq_jax.deploy import export, quantized_file, verify
from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.evaluator import to_pixels
from adadfq_jax.jobs import samples
from adadfq_jax.jobs.configuration import keys_in_messages, resolved, to_keys
from adadfq_jax.network import Function
from adadfq_jax.recipes import Recipe
from adadfq_jax.runtime.progress import log
from adadfq_jax.training import workdir
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.spec import RunSpec


def notes(spec: RunSpec) -> list[str]:
    """Return warnings, before a run, on the exported files that it will leave out."""
    missing = export.missing_for_onnx() if spec.export.onnx else None
    if not missing:
        return []
    return [to_keys(f"WARNING: {export.ONNX_FILE} will be left out: {missing}")]


def require_packages(*, onnx: bool, litert: bool) -> None:
    """Raise InputError if packages that these files need are not installed."""
    missing = export.missing_for_onnx() if onnx or litert else None
    missing = missing or (export.missing_for_litert() if litert else None)
    if missing:
        with keys_in_messages():
            raise missing


def check(assembly: Assembly) -> None:
    """Refuse what the settings ask for but the network cannot have, before a run.

    Raises:
      InputError: see `deploy.export.check_names`.
    """
    named = assembly.info, assembly.function, assembly.graph
    export.check_names(assembly.spec.export, *named)


def export_files(
    spec: RunSpec,
    file: Path,
    folder: Path,
    function: Function | None = None,
    *,
    all_or_none: bool = False,
) -> dict[str, Any] | None:
    """Write the files that the settings ask for, see `deploy.export.write_exports`.

    Args:
      spec: the settings; `eval` names the images to compare on. If evaluation is
        disabled, G makes them if `file` is in the folder of its run; otherwise they
        are random.
      file: a quantized.safetensors. If it is in the folder of its run, the model card
        describes the run.
      folder: the folder for the files. Files that were made from the same quantized
        file, with the same options and images, are not written again.
      function: the network; None takes the one that the file holds or names.
      all_or_none: whether to raise an error, instead of leaving out the ONNX file,
        when the packages that it needs are not installed. For a .tflite file there
        always is one.

    Returns:
      The contents of export.json, or None if the settings ask for no file. Then only
      the model card is written.

    Raises:
      InputError: the file or the evaluation data cannot be used.
      ExportError: an exported file does not compute what Q does.
    """
    options = spec.export
    # Existing files with any of these options suffice; new ones have the last options.
    enough = [options]
    require_packages(
        onnx=options.onnx and all_or_none, litert=options.target == export.LITERT
    )
    if options.onnx and export.missing_for_onnx():
        enough.append(dataclasses.replace(options, onnx=False))
    # The file is read before anything is removed.
    network = quantized_file.load_quantized(file, function)
    info, function = network.info, network.function
    digest, there = workdir.sha256(file), folder / workdir.EXPORT_FILE
    run = workdir.describe_run(file.parent, digest)
    record = workdir.read_json(there) if there.exists() else {}
    earlier = bool(record) and record.get("sha256") != digest  # of another Q
    name = _set_name(spec)
    if not earlier and any(_is_as_wanted(record, o, name, folder) for o in enough):
        return record
    options = enough[-1]
    if not (options.onnx or options.stablehlo):
        if earlier:
            export.remove_exports(folder)
        # Otherwise the card there describes the files that are there.
        if earlier or not record:
            export.write_card(file, folder, run, function)
        return None
    images, generated = None, None
    wants_ranges = options.onnx and options.integer
    if run is not None and (wants_ranges or not name):
        generated = _generated_images(file.parent, function)
    if name:
        images = verify.evaluation_images(
            evaluation.load_eval_set(spec.eval, info.image_shape, info.num_classes),
            name,
        )
    elif generated is not None:
        pixels = to_pixels(generated, info.mean, info.std)
        images = verify.Images(pixels, None, "images of G")
    if earlier:  # removed only now that the images could be read
        export.remove_exports(folder)
    return export.write_exports(file, folder, options, images, run, function, generated)


def export_file(
    config: Any, file: Path, folder: Path, recipe: Recipe | None = None
) -> list[str]:
    """Export a `quantized.safetensors` to the files that `config.export` asks for.

    Args:
      config: names the wanted files, and the evaluation set to compare on.
      file: the quantized file.
      folder: the folder for the exported files.
      recipe: see `configuration.resolved`.

    Returns:
      A line for every exported file.

    Raises:
      InputError: the file or the evaluation data cannot be used.
      ExportError: an exported file does not compute what Q does.
    """
    with resolved(config, recipe, trains=False) as spec:
        if not (spec.export.onnx or spec.export.stablehlo):
            raise InputError(
                "export.onnx=False and export.stablehlo=False: nothing to export"
            )
        record = export_files(spec, file, folder, all_or_none=True) or {"files": {}}
    return [
        f"{folder / made['file']}: {made['bytes']:,} bytes (float32"
        f" {record['float32_bytes']:,}), takes {made['input']}, same class as Q for"
        f" {100 * made['same_class']:.2f} % (on {made['images']:,} of"
        f" {made['images_of']})"
        + ("" if made["top1"] is None else f", top-1 {made['top1']:.2f} %")
        for made in record["files"].values()
    ]


def _set_name(spec: RunSpec) -> str:
    """Return the evaluation set and split, or '' if evaluation is disabled."""
    e = spec.eval
    return settings.split_name(e.dataset, e.data_dir, e.split) if e.measures else ""


def _is_as_wanted(
    record: Mapping[str, Any], options: settings.Export, name: str, folder: Path
) -> bool:
    """Tell whether an export.json fits the options and set, and its files are whole.

    Without an evaluation set, files that were checked on any images fit.
    """
    made = record.get("files", {}).values()
    return (
        record.get("options") == dataclasses.asdict(options)
        and all(not name or each.get("images_of") == name for each in made)
        and export.are_whole(record, folder)
    )


def _generated_images(folder: Path, function: Function | None) -> np.ndarray | None:
    """Make images with the G of a run; None if it has no undamaged checkpoint."""
    try:
        values = workdir.read_json(folder / workdir.CONFIG_FILE)
        with resolved(values, trains=False) as spec:
            assembly = samples.assemble(spec, folder, function)
            return samples.draw(assembly, folder, verify.UNLABELLED_IMAGES)[0]
    except InputError as error:
        log.warning(f"exported files are made and checked on random images: {error}")
        return None
