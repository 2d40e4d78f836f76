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


def next_pause(step: int, end: int, callbacks: Sequence[Callback]) -> int:
    """The first step after `step` that a callback is due at, `end` at the latest."""
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
    """Takes the steps from `begin` to `end`, and waits for the device then only.

    Args:
      step: steps in a dispatch -> compiled (state, *constants) -> (state, metrics).
      state: at `begin`; it is donated.
      constants: see `fit`, and so the others.
      begin: steps taken so far.
      end: where the loop pauses.
      per_dispatch: steps in a dispatch.
      reduce: of the metrics.
      stop: no dispatch begins once it is true, where each has one step.

    Returns:
      The state, the steps taken so far, and the means of the metrics with
      `steps_per_second`; {} where no step was taken.
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
