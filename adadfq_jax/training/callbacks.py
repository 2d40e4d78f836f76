"""Callbacks of the loop: call a function at some steps, in all processes or in one."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from adadfq_jax.runtime import multihost

Action = Callable[[int, Any, Mapping[str, Any]], None]  # takes step, state, metrics


class At:
    """A callback that calls a function at some steps.

    Args:
      steps: the steps after which the loop pauses for this callback.
      action: the function; it takes the step, the state and the metrics.
      on_primary: whether only the primary process calls the function; an error there
        ends all processes with the same message.
    """

    def __init__(
        self, steps: Collection[int], action: Action, *, on_primary: bool = False
    ):
        self._steps, self._action = frozenset(steps), action
        self._on_primary = on_primary

    def due(self, step: int) -> bool:
        """Tell whether `step` is one of the steps."""
        return step in self._steps

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Call the function."""
        if self._on_primary:
            multihost.from_first(lambda: self._action(step, state, metrics))
        else:
            self._action(step, state, metrics)
