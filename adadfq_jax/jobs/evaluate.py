"""The job --mode=evaluate: the top-1 of a file, or how often Q answers as P does."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from adadfq_jax import evaluation, settings
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import NetworkInfo, graph_of
from adadfq_jax.errors import InputError
from adadfq_jax.game import players
from adadfq_jax.jobs.configuration import load_teacher, resolved
from adadfq_jax.recipes import Recipe
from adadfq_jax.runtime import sharding
from adadfq_jax.teacher import hub
from adadfq_jax.training import build
from adadfq_jax.training.measurements import make_evaluator
from adadfq_jax.training.spec import RunSpec


class _Loaded(NamedTuple):
    """A network to measure: (variables, normalised images) -> logits."""

    info: NetworkInfo
    bits: str
    variables: Any
    apply: Callable[..., Any]


def _load(spec: RunSpec, file: str | Path) -> _Loaded:
    """Load P's file or a `quantized.safetensors`; its content decides which it is."""
    if isinstance(file, Path) and quantized_file.is_quantized(file):
        q = quantized_file.load_quantized(file)
        apply = functools.partial(players.q_logits, q.graph, q.options)
        return _Loaded(q.info, q.info.bits, q.variables, apply)
    function, spec = load_teacher(spec.replace({"teacher.path": str(file)}))
    info = build.network_info(spec)
    apply = functools.partial(players.p_logits, graph_of(info, function))
    return _Loaded(info, "in full precision", function.variables, apply)


def evaluate(config: Any, file: str | Path, recipe: Recipe | None = None) -> str:
    """Measure the top-1 of P's file or a `quantized.safetensors` on the evaluation set.

    Args:
      config: names the evaluation set. For P's file it also describes P; a quantized
        file contains its description.
      file: a file of either kind, whose content decides which, or the address of P in
        a repository, hf://OWNER/NAME.
      recipe: see `configuration.resolved`.

    Returns:
      A line with the accuracy.

    Raises:
      InputError: the file or the evaluation data cannot be used.
    """
    with resolved(config, recipe, trains=False) as spec:
        info, bits, variables, apply = _load(spec, hub.located(file))
        chosen = spec.eval
        eval_set = evaluation.load_eval_set(chosen, info.image_shape, info.num_classes)
        devices, _ = sharding.choose_devices(spec.devices, 1, "per_device")
        evaluator = make_evaluator(chosen, info, eval_set, devices)
        top1 = evaluator(apply).top1(sharding.replicate(variables, devices))
    name = settings.split_name(chosen.dataset, chosen.data_dir, chosen.split)
    return (
        f"{file}: {info.model} {bits}, {name}, {eval_set.size:,} images: top-1"
        f" {top1:.2f} %"
    )


def has_no_labels(config: Any, recipe: Recipe | None = None) -> bool:
    """Tell whether the configuration names a folder of images without classes."""
    with resolved(config, recipe, trains=False) as spec:
        return evaluation.is_unlabelled(spec.eval)


def agreement(config: Any, q_file: str | Path, recipe: Recipe | None = None) -> str:
    """Measure how often Q answers as P does, on a folder of images without classes.

    Args:
      config: names the folder and P's file, and describes P.
      q_file: a `quantized.safetensors`.
      recipe: see `configuration.resolved`.

    Returns:
      A line with the part of the images that get the same class.

    Raises:
      InputError: a file or an image cannot be used, or Q is not of P.
    """
    with resolved(config, recipe, trains=False) as spec:
        p_file = spec.teacher.path
        if not quantized_file.is_quantized(Path(q_file)) or not p_file:
            raise InputError(
                f"{spec.eval.data_dir} has no classes: there it can be measured how"
                " often Q answers as P does; name Q's file with --file, and P's with"
                " teacher.path"
            )
        p, q = _load(spec, hub.located(p_file)), _load(spec, Path(q_file))
        what = (p.info.image_shape, p.info.num_classes)
        if what != (q.info.image_shape, q.info.num_classes):
            raise InputError(
                f"{q_file}: {q.info.image_shape} images and {q.info.num_classes}"
                f" classes, P has {what[0]} and {what[1]}"
            )
        images = evaluation.load_unlabelled(spec.eval, q.info.image_shape)
        devices, _ = sharding.choose_devices(spec.devices, 1, "per_device")
        evaluator = make_evaluator(spec.eval, q.info, images, devices)(
            lambda variables, x: q.apply(variables[1], x),
            reference=lambda variables, x: p.apply(variables[0], x),
        )
        variables = sharding.replicate((p.variables, q.variables), devices)
        same = evaluator.top1(variables)
    name = settings.split_name(settings.FOLDER, spec.eval.data_dir, spec.eval.split)
    return (
        f"{q_file}: {q.info.model} {q.bits}, {name}, {images.size:,} images without"
        f" classes: answers as {p_file} does on {same:.2f} %"
    )
