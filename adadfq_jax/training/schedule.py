"""When what happens in a run: phases, and the steps at which Q is evaluated."""

import numpy as np

from adadfq_jax.game import Phase
from adadfq_jax.settings import Game, Settings


def phase_at(step: int, game: Game) -> Phase:
    """The phase of step `step`, counted from 0."""
    if step >= game.warmup_steps:
        return Phase.BOTH
    again = game.warmup_steps - game.reobserve_steps
    observing = step < game.observe_steps or step >= again
    return Phase.OBSERVE if observing else Phase.G_ONLY


def phase_ends(game: Game) -> list[int]:
    """Steps at which a phase is over; the last is the number of steps."""
    again = game.warmup_steps - game.reobserve_steps
    ends = {game.observe_steps, again, game.warmup_steps, game.steps}
    return sorted(end for end in ends if 0 < end <= game.steps)


def evaluation_steps(spec: Settings) -> list[int]:
    """Steps after which Q is evaluated: before it trains, between, and the last."""
    start, end = spec.game.warmup_steps, spec.game.steps
    return sorted({int(s) for s in np.linspace(start, end, spec.eval.between + 2)})


def saves(spec: Settings, steps: int) -> frozenset[int]:
    """Steps after which a checkpoint is written: the game's last and the last too.

    Args:
      spec: of the run.
      steps: of the whole run.
    """
    every = spec.checkpoint.every
    at = range(every, steps + 1, every) if every else ()
    return frozenset(at) | {spec.game.steps, steps}


def pauses(spec: Settings) -> list[int]:
    """Steps of the game after which the host waits: to log, measure or save."""
    at = set(range(spec.log.every, spec.game.steps + 1, spec.log.every))
    at |= {*saves(spec, spec.game.steps), *phase_ends(spec.game)}
    if spec.eval.measures:
        at |= set(evaluation_steps(spec))
    return sorted(step for step in at if step > 0)


def reconstruction_pauses(spec: Settings, steps: int) -> list[int]:
    """The same after the game; the host waits at the end of a block besides.

    Args:
      spec: of the run.
      steps: of the whole run.
    """
    at = {*range(0, steps + 1, spec.log.every), *saves(spec, steps)}
    return sorted(step for step in at if step > spec.game.steps)
