"""Steps of the game that draw their own batches, one or several in a dispatch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax.game import Batch, GameState
from adadfq_jax.game.collectives import share


def make_game_step(
    play: Callable[..., tuple[GameState, dict[str, Array]]],
    *,
    draw: Callable[[Array], Batch],
    axis_name: str | None = None,
) -> Callable[..., tuple[GameState, dict[str, Array]]]:
    """Make the step that draws its own batch.

    Args:
      play: the result of `game.make_play`.
      draw: key -> the *global* batch.
      axis_name: mapped axis over which the global batch is split, or None.

    Returns:
      `game_step(state, teacher, key, phase)` -> (state, metrics). The draw depends on
      (key, state.step) alone. Every device draws the same global batch and takes its
      slice, so neither resuming nor the number of devices changes the batch.
    """

    def game_step(state, teacher, key, phase):
        batch = draw(jax.random.fold_in(key, state.step))
        return play(state, teacher, share(batch, axis_name), phase)

    return game_step


def make_rollout(
    step: Callable[..., tuple[Any, dict[str, Array]]], count: int
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """Make a function that takes `count` steps, as a scan; `step` itself for one.

    Args:
      step: (state, *constants) -> (state, metrics), as `make_game_step` returns it.
      count: number of steps.

    Returns:
      A function with the signature of `step`. Its metrics are the means over the steps.
    """
    if count == 1:
        return step

    def rollout(state, *constants, **static):
        def one(state, _):
            return step(state, *constants, **static)

        state, metrics = jax.lax.scan(one, state, length=count)
        means = jax.tree.map(lambda x: jnp.mean(x, 0), metrics)
        return state, {**means, "first_bad_step": state.first_bad_step}

    return rollout
