"""When what happens in a game: phases, evaluations, the pauses of the host."""

import numpy as np
from ml_collections import ConfigDict

from adadfq_jax.game import Phase


def phase_at(step: int, game_config: ConfigDict) -> Phase:
    """The phase of step `step`, counted from 0."""
    if step >= game_config.warmup_steps:
        return Phase.BOTH
    again = game_config.warmup_steps - game_config.reobserve_steps
    observing = step < game_config.observe_steps or step >= again
    return Phase.OBSERVE if observing else Phase.G_ONLY


def phase_ends(game_config: ConfigDict) -> list[int]:
    """Steps at which a phase is over; the last is the number of steps."""
    warmup = game_config.warmup_steps
    again = warmup - game_config.reobserve_steps
    ends = {game_config.observe_steps, again, warmup, game_config.steps}
    return sorted(end for end in ends if 0 < end <= game_config.steps)


def evaluation_steps(config: ConfigDict) -> list[int]:
    """Steps after which Q is evaluated: before it trains, between, and the last."""
    start, end = config.game.warmup_steps, config.game.steps
    return sorted({int(s) for s in np.linspace(start, end, config.eval.between + 2)})


def next_pause(step: int, config: ConfigDict) -> int:
    """The next step after which the host waits for the device, to log or to save."""
    every = [config.log.every, config.checkpoint.every or config.game.steps]
    at = [n * (step // n + 1) for n in every]
    at += phase_ends(config.game)
    if config.eval.enabled:
        at += evaluation_steps(config)
    return min(end for end in at if end > step)
