"""What is measured and exported: evaluation sets, top-1 of P and Q, checked files.

As `build`, this reads plain values off the ConfigDict.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from adadfq_jax import config as base
from adadfq_jax import evaluation, models
from adadfq_jax.deploy import export, quantized_file, verify
from adadfq_jax.deploy.network import NetworkInfo, make_student
from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.evaluator import Evaluator, to_pixels
from adadfq_jax.jobs import generated
from adadfq_jax.runtime.progress import mention, say
from adadfq_jax.training import workdir
from adadfq_jax.training.build import network_info, prepare


def load_eval_set(config: ConfigDict, info: NetworkInfo) -> evaluation.AnySet:
    """The configuration's evaluation set, checked against the network.

    Raises:
      InputError: it cannot be read, or its images or labels do not fit.
    """
    e = config.eval
    if not e.enabled:
        raise InputError(
            "config.eval.enabled=False, no config.eval.dataset, or a folder without"
            " config.eval.data_dir: there is nothing to evaluate on"
        )
    if e.dataset == base.FOLDER or e.resize:
        streamed = _stream(e, info)
        mention(streamed.description)
        return streamed
    eval_set = evaluation.load(e.dataset, e.data_dir, e.split)
    shape = eval_set.images.shape[1:]
    if shape != info.image_shape or eval_set.labels.max() >= info.num_classes:
        raise InputError(
            f"evaluation data {e.dataset!r} has images {shape} and labels to"
            f" {eval_set.labels.max()}, the network takes {info.image_shape} and has"
            f" {info.num_classes} classes; images of other sizes are resized and"
            " cropped by config.eval.resize"
        )
    return eval_set


def _stream(e: ConfigDict, info: NetworkInfo) -> evaluation.StreamedSet:
    """A folder, or a TFDS set that is resized, by `config.eval`."""
    decoding = evaluation.Decoding(info.image_shape, e.resize, e.filter)
    if e.dataset == base.FOLDER:
        return evaluation.stream_folder(
            Path(e.data_dir), e.split, e.classes, info.num_classes, decoding
        )
    return evaluation.stream(e.dataset, e.data_dir, e.split, info.num_classes, decoding)


def export_files(config: ConfigDict, file: Path, folder: Path) -> dict[str, Any] | None:
    """Writes what `config.export` asks for, see `deploy.write.write_exports`.

    Args:
      config: its `eval` names the images to compare on. Where that is disabled they are
        those that G makes, if the run that left the file is there, or random.
      file: a quantized.safetensors. A run that left it in its folder is described in
        the model card.
      folder: where the files go. Those that are there of the same file, by the same
        options and checked on the same set, are left as they are.

    Returns:
      The contents of export.json, None where nothing is asked for: then there is the
      model card alone.

    Raises:
      InputError: the file or the evaluation data cannot be used.
      ExportError: an exported file does not compute what Q does.
    """
    wanted = config.export
    options = export.Options(*(wanted[name] for name in export.Options._fields))
    info = quantized_file.load_quantized(file).info  # before anything is removed
    digest, there = workdir.sha256(file), folder / workdir.EXPORT_FILE
    run = workdir.describe_run(file.parent, digest)
    record = workdir.read_json(there) if there.exists() else {}
    earlier = bool(record) and record.get("sha256") != digest  # of another Q
    if not (options.onnx or options.stablehlo):
        if earlier:
            export.remove_exports(folder)
        if earlier or not record:  # else its card tells of files there
            export.write_card(file, folder, run)
        return None
    name = _set_name(config)
    if not earlier and _is_as_wanted(record, options, name, folder):
        return record
    images = None
    if name:
        images = verify.evaluation_images(load_eval_set(config, info), name)
    elif run is not None:
        images = _generated_images(file.parent)
    if earlier:  # not before this one's images could be read
        export.remove_exports(folder)
    return export.write_exports(file, folder, options, images, run)


def _set_name(config: ConfigDict) -> str:
    """The set and split to evaluate on, '' where that is disabled."""
    e = config.eval
    return base.split_name(e.dataset, e.data_dir, e.split) if e.enabled else ""


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


def _generated_images(folder: Path) -> verify.Images | None:
    """Images of the G of a run, None where it has no whole checkpoint any more."""
    try:
        config = prepare(
            base.from_json(workdir.read_json(folder / workdir.CONFIG_FILE))
        )
        images, _ = generated.draw(config, folder, verify.UNLABELLED_IMAGES)
    except InputError as error:
        say(f"WARNING: exported files are checked on random images: {error}")
        return None
    p = config.teacher
    return verify.Images(to_pixels(images, p.mean, p.std), None, "images of G")


def make_evaluator(
    config: ConfigDict,
    info: NetworkInfo,
    eval_set: evaluation.AnySet,
    devices: Sequence[jax.Device],
) -> Callable[[Callable[..., Any]], Evaluator]:
    """Makes `Evaluator`s of an `apply` function on a given set."""
    return functools.partial(
        Evaluator,
        eval_set=eval_set,
        mean=info.mean,
        std=info.std,
        batch_size=config.eval.batch_size,
        devices=devices,
    )


class Measurements:
    """Top-1 of P and Q on the evaluation set; does nothing where that is disabled.

    history: (step, top-1 in per cent) of Q, in the order of the steps.
    evaluated_on: which set and split, '' where evaluation is disabled.
    eval_set: the images and labels, or None.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device]):
        self.history: list[tuple[int, float]] = []
        self.evaluated_on = ""
        self.eval_set: evaluation.AnySet | None = None
        self._p = self._q = None
        if not config.eval.enabled:
            return
        info = network_info(config)
        eval_set = self.eval_set = load_eval_set(config, info)
        e = config.eval
        self.evaluated_on = f"{e.dataset} {e.split}"
        if e.dataset == base.FOLDER:
            self.evaluated_on += f" {Path(e.data_dir).resolve()}"
        evaluator = make_evaluator(config, info, eval_set, devices)
        p_model = models.get_model(info.model, num_classes=info.num_classes)
        self._p = evaluator(p_model.apply)
        student = make_student(info, range_ema=config.quant.range_ema)
        self._q = evaluator(student.apply)

    def p_top1(self, p_variables: Any) -> float | None:
        """P's accuracy in per cent, None where evaluation is disabled."""
        return None if self._p is None else self._p.top1(p_variables)

    def measure_q(self, step: int, variables: Any) -> float | None:
        """Q's accuracy in per cent; kept in the history."""
        if self._q is None:
            return None
        self.history.append((step, self._q.top1(variables)))
        return self.history[-1][1]
