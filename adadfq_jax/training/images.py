"""Images of a game's G for the work after the game."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax.game import GameState, framing
from adadfq_jax.training.build import Assembly, make_frames

# Folded into the seed's key to draw images; no run has that many steps.
_IMAGES_STREAM = 2**31 - 5
# Folded into a batch's key to draw frames; the game uses 0 to 2.
_FRAMES_STREAM = 3
_AT_ONCE = 64  # images that are computed at once after the game, at most


def split(images: jax.Array) -> list[jax.Array]:
    """Split images [N, H, W, C] into batches of one size, which share a program."""
    size = math.gcd(len(images), _AT_ONCE)
    return [images[i : i + size] for i in range(0, len(images), size)]


def draw_images(
    assembly: Assembly, state: GameState, seed: int, count: int, framed_share: float
) -> jax.Array:
    """Make images of G, in P's normalised space [N, H, W, C].

    G makes them in batches, as in the game, and a part of each batch is put into flat
    frames (`game.framing`). They depend on the state and the seed alone.

    Args:
      assembly: the parts of the run.
      state: the state of the game.
      seed: the seed of the draws.
      count: number of images, N.
      framed_share: part of the images that is in frames.
    """
    size = assembly.batch_size
    draw_frames = make_frames(assembly.spec, size)

    @jax.jit
    def make(variables: Any, key: jax.Array) -> jax.Array:
        batch = assembly.draw(key)
        images, _ = assembly.parts.networks.g_apply(
            variables, batch.latents, batch.labels, mutable=["batch_stats"]
        )
        frames = draw_frames(jax.random.fold_in(key, _FRAMES_STREAM))
        framed = framing.put_in_frames(images, frames)
        # Framed images are evenly spread: any part of a batch has its share.
        counted = np.floor(np.arange(size + 1) * framed_share)
        is_framed = counted[1:] > counted[:-1]
        return jnp.where(is_framed[:, None, None, None], framed, images)

    variables = {"params": state.g_params, "batch_stats": state.g_batch_stats}
    key = jax.random.fold_in(jax.random.key(seed), _IMAGES_STREAM)
    made = [
        make(variables, jax.random.fold_in(key, i)) for i in range(-(-count // size))
    ]
    return jnp.concatenate(made)[:count]
