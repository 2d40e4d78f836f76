"""Top-1 of P and Q on the evaluation set of a run."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from adadfq_jax import evaluation, game
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.evaluation.evaluator import Evaluator
from adadfq_jax.game import players
from adadfq_jax.settings import FOLDER, Eval
from adadfq_jax.training.build import Assembly


def make_evaluator(
    chosen: Eval,
    info: NetworkInfo,
    eval_set: evaluation.AnySet,
    devices: Sequence[jax.Device],
) -> Callable[..., Evaluator]:
    """Return a function that makes the `Evaluator` of an `apply` function on a set."""
    return functools.partial(
        Evaluator,
        eval_set=eval_set,
        mean=info.mean,
        std=info.std,
        batch_size=chosen.batch_size,
        devices=devices,
    )


class Measurements:
    """Top-1 of P and Q on the evaluation set; where that is disabled, it does nothing.

    Attributes:
      history: (step, top-1 in per cent) of Q, in the order of the steps.
      evaluated_on: name of the set and split, '' where evaluation is disabled.
      eval_set: the images and labels, or None where evaluation is disabled.
    """

    def __init__(self, assembly: Assembly, devices: Sequence[jax.Device]):
        self.history: list[tuple[int, float]] = []
        self.evaluated_on = ""
        self.eval_set: evaluation.AnySet | None = None
        self._p: Evaluator | None = None
        self._q: Evaluator | None = None
        self._devices = devices
        chosen, info = assembly.spec.eval, assembly.info
        if not chosen.measures:
            return
        self.eval_set = evaluation.load_eval_set(
            chosen, info.image_shape, info.num_classes
        )
        self.evaluated_on = f"{chosen.dataset} {chosen.split}"
        if chosen.dataset == FOLDER:
            self.evaluated_on += f" {Path(chosen.data_dir).expanduser().resolve()}"
        self.measure_with(assembly)

    def measure_with(self, assembly: Assembly) -> None:
        """Measure the P and the Q of an assembly from now on, which has the same P."""
        if self.eval_set is None:
            return
        evaluator = make_evaluator(
            assembly.spec.eval, assembly.info, self.eval_set, self._devices
        )
        graph, options = assembly.graph, assembly.parts.q_options
        self._p = evaluator(functools.partial(players.p_logits, graph))
        self._q = evaluator(functools.partial(players.q_logits, graph, options))

    def p_top1(self, teacher: game.Teacher) -> float | None:
        """Measure P's top-1 in per cent; None where evaluation is disabled."""
        return None if self._p is None else self._p.top1(teacher.variables)

    def measure_q(self, step: int, variables: Any) -> float | None:
        """Measure Q's top-1 in per cent, and append it to the history."""
        if self._q is None:
            return None
        self.history.append((step, self._q.top1(variables)))
        return self.history[-1][1]
