"""The host's loop over the steps of a run, as a function of plain values."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from adadfq_jax.settings import Game
from adadfq_jax.training.build import Steps
from adadfq_jax.training.metrics import interval_means
from adadfq_jax.training.schedule import phase_at, phase_ends


class Callback(Protocol):
    """An action at pauses of the loop: logging, evaluating, recording or saving."""

    def due(self, step: int) -> bool:
        """Tell whether the loop pauses after `step` steps for this callback.

        The answer for a step must always be the same.
        """

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Act on the state after `step` steps.

        Args:
          step: number of steps taken so far.
          state: the state that the step function returned.
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
    """Compile the remaining phases, time a dispatch of each, and estimate the time.

    Each phase runs twice on a copy of the state: once to compile it, once to time it.

    Args:
      steps: the compiled steps, see `fit`.
      state: the state at `begin`; it is not donated.
      constants: the arguments of the step after the state.
      game: the schedule.
      pauses: steps after which the loop pauses.
      begin: number of steps taken so far.
      per_dispatch: number of steps in a dispatch.
      stop: no further phase is compiled once this is true.

    Returns:
      Seconds for the remaining steps, without the pauses.
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


def next_pause(step: int, end: int, callbacks: Sequence[Callback]) -> int:
    """Return the first step after `step` at which a callback is due, at most `end`."""
    return next(
        at
        for at in range(step + 1, end + 1)
        if at == end or any(callback.due(at) for callback in callbacks)
    )


def advance(
    step: Callable[[int], Callable[..., Any]],
    state: Any,
    constants: Sequence[Any],
    begin: int,
    end: int,
    *,
    per_dispatch: int = 1,
    reduce: Callable[..., Mapping[str, Any]] = interval_means,
    stop: Any = None,
) -> tuple[Any, int, dict[str, Any]]:
    """Take the steps from `begin` to `end`, and only then wait for the device.

    Args:
      step: steps in a dispatch -> compiled (state, *constants) -> (state, metrics).
      state: the state at `begin`; it is donated.
      constants: the arguments of the step after the state.
      begin: number of steps taken so far.
      end: the step at which the loop pauses.
      per_dispatch: number of steps in a dispatch.
      reduce: averages the metrics of the interval, see `fit`.
      stop: where a dispatch has one step, no dispatch begins once this is true.

    Returns:
      The state, the number of steps taken so far, and the means of the metrics with
      `steps_per_second`, or {} if no step was taken.
    """
    at, since, pending = begin, time.perf_counter(), []
    while at < end and not (stop and per_dispatch == 1):
        each = per_dispatch if end - at >= per_dispatch else 1
        state, metrics = step(each)(state, *constants)
        pending.append((each, metrics))
        at += each
    if not pending:
        return state, at, {}
    means = reduce(pending, begin)
    rate = (at - begin) / (time.perf_counter() - since)
    return state, at, {**means, "steps_per_second": rate}


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
    """Train from step `begin` to the last step, and pause for the callbacks.

    The host waits for the device only at the pauses.

    Args:
      steps: (phase, steps in a dispatch) -> compiled (state, *constants) ->
        (state, metrics), for one run on all devices or for several runs at once.
      state: the state at `begin`; it is donated.
      constants: the arguments of the step after the state: P and the key.
      game: the schedule.
      begin: number of steps taken so far.
      per_dispatch: number of steps in a dispatch. A stop never shortens a dispatch, so
        that a resumed run repeats the same dispatches.
      reduce: (list of (steps, metrics), first step) -> means of an interval.
      callbacks: called in this order at the pauses at which they are due.
      stop: the loop ends as soon as this is true.

    Returns:
      The state, and the number of steps taken so far, which is smaller than the
      schedule's if the loop was stopped.

    Raises:
      NumericalError: a number is not finite, see `interval_means`.
    """
    step, ends = begin, phase_ends(game)
    while step < game.steps and not stop:
        phase = phase_at(step, game)
        pause = next_pause(step, min(e for e in ends if e > step), callbacks)
        state, step, means = advance(
            functools.partial(steps, phase),
            *(state, constants, step, pause),
            per_dispatch=per_dispatch,
            reduce=reduce,
            stop=stop,
        )
        if not means:
            continue
        found = {"phase": phase.value, **means}
        for callback in callbacks:
            if step < pause or callback.due(step):
                callback(step, state, found)
    return state, step
