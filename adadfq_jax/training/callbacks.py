"""Callbacks of the loop: a function at some steps, in every process or in the first."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from adadfq_jax.runtime import multihost

Action = Callable[[int, Any, Mapping[str, Any]], None]  # of step, state, metrics


class At:
    """Calls a function at some steps.

    Args:
      steps: after which the loop pauses for it.
      action: takes the step, the state and the metrics.
      on_primary: whether process 0 alone acts; an error there ends all alike.
    """

    def __init__(
        self, steps: Collection[int], action: Action, *, on_primary: bool = False
    ):
        self._steps, self._action = frozenset(steps), action
        self._on_primary = on_primary

    def due(self, step: int) -> bool:
        """Whether `step` is one of the steps."""
        return step in self._steps

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Calls the function."""
        if self._on_primary:
            multihost.from_first(lambda: self._action(step, state, metrics))
        else:
            self._action(step, state, metrics)
