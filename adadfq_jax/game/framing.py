"""Flat frames around images of G; Q learns from framed images as well.

Real images have flat parts: a background, a sky, padding. In a flat part, each channel
of the first layers is a constant, and quantization moves the whole part by the same
rounding error. Images of G are nowhere flat, so Q cannot learn from them to correct
that error.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

SMALLEST_SIDE = 0.4  # of the kept rectangle, as a part of the image's side


class Frames(NamedTuple):
    """The pixels of each image that are kept, and the colour of all others.

    Attributes:
      keep: boolean [B, H, W, 1], true where a pixel is kept.
      fill: [B, 1, 1, C], the colour of the frame in P's normalised space.
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
    """Draw a frame for each image of a batch.

    A rectangle of each image is kept, about half of its pixels on average. The
    rectangle's sides are uniform in [0.4, 1] of the image's sides and its position is
    uniform, before both are rounded to pixels. The rest of the image becomes black or
    white with equal probability.

    Args:
      key: key of the draw.
      batch_size: B.
      image_shape: (H, W, C).
      black: [C], pixel 0 in P's normalised space.
      white: [C], pixel 1 in P's normalised space.
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
    """Put images [B, H, W, C] into their frames."""
    return jnp.where(frames.keep, images, frames.fill.astype(images.dtype))
