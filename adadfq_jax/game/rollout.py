"""Steps of the game on batches that they draw, one or many in a dispatch."""

from collections.abc import Callable

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
    """Makes the step that draws its own batch.

    Args:
      play: from `game.make_play`.
      draw: key -> the *global* batch.
      axis_name: mapped axis of the global batch, or None.

    Returns:
      `game_step(state, teacher, key, phase)` -> (state, metrics). The draw is a
      function of (key, state.step) alone and the same on every device, which then
      takes its slice: neither resuming nor the number of devices changes it.
    """

    def game_step(state, teacher, key, phase):
        batch = draw(jax.random.fold_in(key, state.step))
        return play(state, teacher, share(batch, axis_name), phase)

    return game_step


def make_rollout(
    game_step: Callable[..., tuple[GameState, dict[str, Array]]], count: int
) -> Callable[..., tuple[GameState, dict[str, Array]]]:
    """Makes `count` steps out of one, as a scan; `game_step` itself for one.

    Args:
      game_step: from `make_game_step`.
      count: how many.

    Returns:
      A function like `game_step`; its metrics are the means over the steps.
    """
    if count == 1:
        return game_step

    def rollout(state, teacher, key, phase):
        def one(state, _):
            return game_step(state, teacher, key, phase)

        state, metrics = jax.lax.scan(one, state, length=count)
        means = jax.tree.map(lambda x: jnp.mean(x, 0), metrics)
        return state, {**means, "first_bad_step": state.first_bad_step}

    return rollout
