"""Exported files of a quantized network: written, checked and kept up to date."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adadfq_jax import evaluation, settings
from adadfq_jax.deploy import export, quantized_file, verify
from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.evaluator import to_pixels
from adadfq_jax.jobs import samples
from adadfq_jax.jobs.configuration import keys_in_messages, resolved, to_keys
from adadfq_jax.network import Function
from adadfq_jax.recipes import Recipe
from adadfq_jax.runtime.progress import say
from adadfq_jax.training import workdir
from adadfq_jax.training.spec import RunSpec


def notes(spec: RunSpec) -> list[str]:
    """Returns what to say before a run of the files that it will not leave."""
    missing = export.missing_for_onnx() if spec.export.onnx else None
    if not missing:
        return []
    return [to_keys(f"WARNING: {export.ONNX_FILE} will be left out: {missing}")]


def require_onnx() -> None:
    """Raises InputError where what ONNX files need is not installed."""
    missing = export.missing_for_onnx()
    if missing:
        with keys_in_messages():
            raise missing


def export_files(
    spec: RunSpec,
    file: Path,
    folder: Path,
    function: Function | None = None,
    *,
    all_or_none: bool = False,
) -> dict[str, Any] | None:
    """Writes what the settings ask for, see `deploy.export.write_exports`.

    Args:
      spec: its `eval` names the images to compare on. Where that is disabled they are
        those that G makes, if the run that left the file is there, or random.
      file: a quantized.safetensors. A run that left it in its folder is described in
        the model card.
      folder: where the files go. Those that are there of the same file, by the same
        options and checked on the same set, are left as they are.
      function: the network; None is the one of the package that the file names.
      all_or_none: whether an ONNX file is refused where what it needs is not
        installed, instead of left out.

    Returns:
      The contents of export.json, None where nothing is asked for: then there is the
      model card alone.

    Raises:
      InputError: the file or the evaluation data cannot be used.
      ExportError: an exported file does not compute what Q does.
    """
    wanted = spec.export
    options = export.Options(*(getattr(wanted, n) for n in export.Options._fields))
    enough = [options]  # what may be there already, at last what can be written
    if options.onnx and export.missing_for_onnx():
        if all_or_none:
            require_onnx()
        enough.append(options._replace(onnx=False))
    # Before anything is removed.
    info = quantized_file.load_quantized(file, function).info
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
        if earlier or not record:  # else its card tells of files there
            export.write_card(file, folder, run, function)
        return None
    images = None
    if name:
        images = verify.evaluation_images(
            evaluation.load_eval_set(spec.eval, info.image_shape, info.num_classes),
            name,
        )
    elif run is not None:
        images = _generated_images(file.parent, function)
    if earlier:  # not before this one's images could be read
        export.remove_exports(folder)
    return export.write_exports(file, folder, options, images, run, function)


def export_file(
    config: Any, file: Path, folder: Path, recipe: Recipe | None = None
) -> list[str]:
    """Exports a `quantized.safetensors` as `config.export` says: --mode=export.

    Args:
      config: the files that are wanted, and the evaluation set to compare on.
      file: a quantized network.
      folder: where they go.
      recipe: see `configuration.resolved`.

    Returns:
      A line for every file.

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
        f" {record['float32_bytes']:,}), takes {made['input']}, on"
        f" {made['images']:,} of {made['images_of']} the class is Q's for"
        f" {100 * made['same_class']:.2f} %"
        + ("" if made["top1"] is None else f", top-1 {made['top1']:.2f} %")
        for made in record["files"].values()
    ]


def _set_name(spec: RunSpec) -> str:
    """The set and split to evaluate on, '' where that is disabled."""
    e = spec.eval
    return settings.split_name(e.dataset, e.data_dir, e.split) if e.measures else ""


def _is_as_wanted(
    record: Mapping[str, Any], options: export.Options, name: str, folder: Path
) -> bool:
    """Whether an export.json is of what is asked for, and its files are whole.

    Where there is no evaluation set, it does not matter on what they were checked.
    """
    made = record.get("files", {}).values()
    return (
        record.get("options") == options._asdict()
        and all(not name or each.get("images_of") == name for each in made)
        and export.are_whole(record, folder)
    )


def _generated_images(folder: Path, function: Function | None) -> verify.Images | None:
    """Images of the G of a run, None where it has no whole checkpoint any more."""
    try:
        values = workdir.read_json(folder / workdir.CONFIG_FILE)
        with resolved(values, trains=False) as spec:
            images, _ = samples.draw(spec, folder, verify.UNLABELLED_IMAGES, function)
    except InputError as error:
        say(f"WARNING: exported files are checked on random images: {error}")
        return None
    p = spec.teacher
    return verify.Images(to_pixels(images, p.mean, p.std), None, "images of G")
