"""The host's loop over the steps of a run, as a function of plain values."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from adadfq_jax.settings import Game
from adadfq_jax.training.build import Steps
from adadfq_jax.training.metrics import interval_means
from adadfq_jax.training.schedule import phase_at, phase_ends


class Callback(Protocol):
    """What happens at a pause: logging, evaluating, recording, saving."""

    def due(self, step: int) -> bool:
        """Whether the loop pauses after `step` steps for it; the same every time."""

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Acts on the state after `step` steps.

        Args:
          step: steps taken so far.
          state: of the step function.
          metrics: means since the last pause, `phase` and `steps_per_second`.
        """


def expected_seconds(
    steps: Steps,
    state: Any,
    constants: Sequence[Any],
    game: Game,
    pauses: Sequence[int] = (),
    *,
    begin: int = 0,
    per_dispatch: int = 1,
    stop: Any = None,
) -> float:
    """Compiles the phases that are left and times a dispatch of each.

    Each runs twice on a throw-away copy of the state: once to compile, once to time it.

    Args:
      steps: see `fit`, and so the others.
      state: at `begin`; it is left as it is.
      constants: what the step takes beside the state.
      game: the schedule.
      pauses: steps after which the loop pauses.
      begin: steps taken so far.
      per_dispatch: steps in a dispatch.
      stop: nothing more is compiled once it is true.

    Returns:
      Seconds for the steps that are left, pauses not counted.
    """
    seconds = 0.0
    for end in phase_ends(game):
        if end <= begin or stop:
            continue
        # A phase shorter than a dispatch runs step by step.
        pause = min(at for at in (*pauses, end) if at > begin)
        each = per_dispatch if pause - begin >= per_dispatch else 1
        step = steps(phase_at(begin, game), each)
        copy = jax.tree.map(lambda x: x.copy(), state)
        copy, _ = jax.block_until_ready(step(copy, *constants))
        started = time.perf_counter()
        jax.block_until_ready(step(copy, *constants))
        seconds += (end - begin) * (time.perf_counter() - started) / each
        begin = end
    return seconds


def _next_pause(step: int, game: Game, callbacks: Sequence[Callback]) -> int:
    ends = set(phase_ends(game))
    return next(
        at
        for at in range(step + 1, game.steps + 1)
        if at in ends or any(callback.due(at) for callback in callbacks)
    )


def fit(
    steps: Steps,
    state: Any,
    constants: Sequence[Any],
    game: Game,
    *,
    begin: int = 0,
    per_dispatch: int = 1,
    reduce: Callable[..., Mapping[str, Any]] = interval_means,
    callbacks: Sequence[Callback] = (),
    stop: Any = None,
) -> tuple[Any, int]:
    """Trains from step `begin` to the last, and pauses for the callbacks.

    The host waits for the device at the pauses only.

    Args:
      steps: (phase, steps in a dispatch) -> compiled (state, *constants) ->
        (state, metrics): of one run on all devices, or of several runs at once.
      state: at `begin`; it is donated.
      constants: what the step takes beside the state: P's variables and the key.
      game: the schedule.
      begin: steps taken so far.
      per_dispatch: steps in a dispatch; one that has begun is never cut, so that a
        resumed run is dispatched in the same pieces.
      reduce: (list of (steps, metrics), first step) -> means of an interval.
      callbacks: called in their order at the pauses at which they are due.
      stop: the loop ends as soon as it is true.

    Returns:
      The state, and the number of steps taken so far: less than the schedule's where
      the loop was stopped.

    Raises:
      NumericalError: a number is not finite (`interval_means`).
    """
    step = begin
    while step < game.steps and not stop:
        begin, since = step, time.perf_counter()
        phase, end = phase_at(step, game), _next_pause(step, game, callbacks)
        pending = []
        while step < end and not (stop and per_dispatch == 1):
            each = per_dispatch if end - step >= per_dispatch else 1
            state, metrics = steps(phase, each)(state, *constants)
            pending.append((each, metrics))
            step += each
        if not pending:
            continue
        means = reduce(pending, begin)
        rate = (step - begin) / (time.perf_counter() - since)
        found = {"phase": phase.value, **means, "steps_per_second": rate}
        for callback in callbacks:
            if step < end or callback.due(step):
                callback(step, state, found)
    return state, step
