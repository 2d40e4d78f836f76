"""The job --mode=evaluate: the top-1 of a file on an evaluation set."""

import functools
from pathlib import Path
from typing import Any

from adadfq_jax import evaluation, settings
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import graph_of
from adadfq_jax.game import players
from adadfq_jax.jobs.configuration import load_teacher, resolved
from adadfq_jax.recipes import Recipe
from adadfq_jax.runtime import sharding
from adadfq_jax.training import build
from adadfq_jax.training.measurements import make_evaluator


def evaluate(config: Any, file: Path, recipe: Recipe | None = None) -> str:
    """Measure the top-1 of P's file or a `quantized.safetensors` on the evaluation set.

    Args:
      config: names the evaluation set. For P's file it also describes P; a quantized
        file contains its description.
      file: a file of either kind; its content decides which.
      recipe: see `configuration.resolved`.

    Returns:
      A line with the accuracy.

    Raises:
      InputError: the file or the evaluation data cannot be used.
    """
    with resolved(config, recipe, trains=False) as spec:
        if quantized_file.is_quantized(file):
            network = quantized_file.load_quantized(file)
            info, bits = network.info, network.info.bits
            variables: Any = network.variables
            apply = functools.partial(players.q_logits, network.graph, network.options)
        else:
            spec = spec.replace({"teacher.path": str(file)})
            function, spec = load_teacher(spec)
            info, bits = build.network_info(spec), "in full precision"
            variables = function.variables
            apply = functools.partial(players.p_logits, graph_of(info, function))
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
