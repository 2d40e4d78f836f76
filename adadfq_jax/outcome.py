"""What is measured and exported: evaluation sets, top-1 of P and Q, checked files.

As `build`, this reads plain values off the ConfigDict.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from adadfq_jax import data, export, models, workdir
from adadfq_jax.build import network_info
from adadfq_jax.deploy import check, write
from adadfq_jax.errors import InputError
from adadfq_jax.evaluate import Evaluator


def load_eval_set(config: ConfigDict, info: export.NetworkInfo) -> data.EvalSet:
    """The configuration's evaluation set, checked against the network.

    Raises:
      InputError: it cannot be read, or its images or labels do not fit.
    """
    e = config.eval
    if not e.enabled:
        raise InputError("config.eval.enabled=False: there is nothing to evaluate on")
    eval_set = data.load(e.dataset, e.data_dir, e.split)
    shape = eval_set.images.shape[1:]
    if shape != info.image_shape or eval_set.labels.max() >= info.num_classes:
        raise InputError(
            f"evaluation data {e.dataset!r} has images {shape} and labels to"
            f" {eval_set.labels.max()}, the network takes {info.image_shape} and has"
            f" {info.num_classes} classes"
        )
    return eval_set


def export_files(config: ConfigDict, file: Path, folder: Path) -> dict[str, Any] | None:
    """Writes what `config.export` asks for, see `deploy.write.write_exports`.

    Args:
      config: its `eval` names the images to compare on; random ones where disabled.
      file: a quantized.safetensors. A run that left it in its folder is described in
        the model card.
      folder: where the files go. Those that are there of the same file, by the same
        options, are left as they are.

    Returns:
      The contents of export.json, None where nothing is asked for.

    Raises:
      InputError: the file or the evaluation data cannot be used.
      ExportError: an exported file does not compute what Q does.
    """
    wanted = config.export
    options = write.Options(*(wanted[name] for name in write.Options._fields))
    if not (options.onnx or options.stablehlo):
        return None
    info = export.load_quantized(file).info
    digest, there = workdir.sha256(file), folder / workdir.EXPORT_FILE
    if there.exists():
        record = workdir.read_json(there)
        made = record.get("files", {}).values()
        if (
            record.get("sha256") == digest
            and record.get("options") == options._asdict()
            and all((folder / name["file"]).exists() for name in made)
        ):
            return record
    images = None
    if config.eval.enabled:
        name = f"{config.eval.dataset} {config.eval.split}"
        images = check.evaluation_images(load_eval_set(config, info), name)
    run = workdir.describe_run(file.parent, digest)
    return write.write_exports(file, folder, options, images, run)


def make_evaluator(
    config: ConfigDict,
    info: export.NetworkInfo,
    eval_set: data.EvalSet,
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
    evaluated_on: data set and split, '' where evaluation is disabled.
    eval_set: the images and labels, or None.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device]):
        self.history: list[tuple[int, float]] = []
        self.evaluated_on = ""
        self.eval_set: data.EvalSet | None = None
        self._p = self._q = None
        if not config.eval.enabled:
            return
        info = network_info(config)
        eval_set = self.eval_set = load_eval_set(config, info)
        self.evaluated_on = f"{config.eval.dataset} {config.eval.split}"
        evaluator = make_evaluator(config, info, eval_set, devices)
        p_model = models.get_model(info.model, num_classes=info.num_classes)
        self._p = evaluator(p_model.apply)
        student = export.student(info, range_ema=config.quant.range_ema)
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
