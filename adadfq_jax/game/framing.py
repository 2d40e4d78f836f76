"""Flat frames around images of G, which Q learns from as well.

Real images have flat parts: a background, a sky, padding. There each channel of the
first layers is one constant, and on which side of a rounding step it falls is luck;
images of G are nowhere flat, so that Q cannot learn from them to correct it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

SMALLEST_SIDE = 0.4  # of the rectangle that is kept, as a part of the image's


class Frames(NamedTuple):
    """What of each image is kept, and what the rest becomes.

    keep: boolean [B, H, W, 1]. fill: [B, 1, 1, C], in P's normalised space.
    """

    keep: Array
    fill: Array


def draw_frames(
    key: Array,
    batch_size: int,
    image_shape: tuple[int, ...],
    black: Array,
    white: Array,
) -> Frames:
    """Frames for a batch of images.

    Of each image a rectangle is kept, about half of the pixels on average: its sides
    are uniform in [0.4, 1] of the image's and its place is uniform, before both are
    rounded to pixels. The rest is black or white with equal chance.

    Args:
      key: of the draw.
      batch_size: B.
      image_shape: (H, W, C).
      black: [C], pixel 0 in P's normalised space.
      white: [C], pixel 1.
    """
    fill_key, side_key, place_key = jax.random.split(key, 3)
    sizes = jnp.asarray(image_shape[:2], jnp.float32)[None]
    sides = jax.random.uniform(side_key, (batch_size, 2), minval=SMALLEST_SIDE)
    sides = jnp.round(sides * sizes)
    first = jnp.round(jax.random.uniform(place_key, (batch_size, 2)) * (sizes - sides))

    def inside(axis):
        at = jnp.arange(image_shape[axis], dtype=jnp.float32)[None]
        start = first[:, axis, None]
        return (at >= start) & (at < start + sides[:, axis, None])

    keep = inside(0)[:, :, None] & inside(1)[:, None, :]
    is_white = jax.random.bernoulli(fill_key, shape=(batch_size, 1))
    fill = jnp.where(is_white, white[None], black[None])
    return Frames(keep[..., None], fill[:, None, None])


def put_in_frames(images: Array, frames: Frames) -> Array:
    """Images [B, H, W, C] in their frames."""
    return jnp.where(frames.keep, images, frames.fill.astype(images.dtype))
