"""The schedule of a run: its phases, and the steps at which the loop pauses."""

import numpy as np

from adadfq_jax.game import Phase
from adadfq_jax.settings import Game, Settings


def phase_at(step: int, game: Game) -> Phase:
    """Return the phase of step `step`, counted from 0."""
    if step >= game.warmup_steps:
        return Phase.BOTH
    return Phase.OBSERVE if step < game.observe_steps else Phase.G_ONLY


def phase_ends(game: Game) -> list[int]:
    """Return the steps at which a phase ends; the last is the number of steps."""
    ends = {game.observe_steps, game.warmup_steps, game.steps}
    return sorted(end for end in ends if 0 < end <= game.steps)


def evaluation_steps(spec: Settings) -> list[int]:
    """Return the steps after which Q is evaluated.

    The first is the one before Q trains, the last is the last step of the game, and
    `eval.between` lie between them.
    """
    start, end = spec.game.warmup_steps, spec.game.steps
    return sorted({int(s) for s in np.linspace(start, end, spec.eval.between + 2)})


def saves(spec: Settings, steps: int) -> frozenset[int]:
    """Return the steps after which a checkpoint is written.

    The last steps of the game and of the run are always among them.

    Args:
      spec: the settings of the run.
      steps: number of steps of the whole run.
    """
    every = spec.checkpoint.every
    at = range(every, steps + 1, every) if every else ()
    return frozenset(at) | {spec.game.steps, steps}


def pauses(spec: Settings) -> list[int]:
    """Return the steps of the game after which the loop logs, measures or saves."""
    at = set(range(spec.log.every, spec.game.steps + 1, spec.log.every))
    at |= {*saves(spec, spec.game.steps), *phase_ends(spec.game)}
    if spec.eval.measures:
        at |= set(evaluation_steps(spec))
    return sorted(step for step in at if step > 0)


def reconstruction_pauses(spec: Settings, steps: int) -> list[int]:
    """Return the steps of the reconstruction after which the loop logs or saves.

    The loop also pauses at the end of every block.

    Args:
      spec: the settings of the run.
      steps: number of steps of the whole run.
    """
    at = {*range(0, steps + 1, spec.log.every), *saves(spec, steps)}
    return sorted(step for step in at if step > spec.game.steps)
