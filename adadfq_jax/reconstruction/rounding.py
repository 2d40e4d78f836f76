"""Kernels whose rounding and scale are learned (AdaRound, arXiv 2004.10568; Genie).

A kernel w is quantized to k bits on a grid that is chosen once, scale s0 and zero point
z per output channel. Its code is that of the step below w or the one above:

    u = clip(floor(w / s0 + z) + h(V), 0, 2^k - 1)      w' = (u - z) s0 f

with V learned for every value and f for every channel. While they train,
h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) lies between 0 and 1; a growing penalty makes it
one of them, and in the end h = [V >= 0]. V begins where h(V) is what w is above the
step below it: the kernel begins as w, and its rounded codes as those of w, but for
halves, which are rounded up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax import quant

_STRETCH = 1.2  # of the sigmoid, so that h reaches 0 and 1
_BEYOND = 0.1  # by which it is lowered


class Grid(NamedTuple):
    """The steps that a kernel is rounded to.

    below: the code of the step below each value, float32, not clipped; of the kernel's
    shape. scale: s0. zero_point: z, integral. Both broadcast to it.
    """

    below: Array
    scale: Array
    zero_point: Array


def start(
    kernel: Array, bits: int, shrink: Array | None, out_axes: tuple[int, ...]
) -> tuple[Grid, Array]:
    """The grid of a kernel, and V where it begins.

    Args:
      kernel: see `quant.kernel_range`.
      bits: k, from 2 to 8.
      shrink: see `quant.kernel_range`.
      out_axes: of the output channels.
    """
    inverse_scale, scale, first = quant.grid(
        *quant.kernel_range(kernel, shrink, out_axes), bits
    )
    place = inverse_scale * kernel - first
    below = jnp.floor(place)
    v = -jnp.log(_STRETCH / (place - below + _BEYOND) - 1)
    return Grid(below, scale, -first), v


def soft(v: Array) -> Array:
    """h(V), in [0, 1]."""
    return jnp.clip(_STRETCH * jax.nn.sigmoid(v) - _BEYOND, 0.0, 1.0)


def codes(grid: Grid, above: Array, bits: int) -> Array:
    """u. above: 0 or 1, or between them while V trains; u is whole where it is."""
    return jnp.clip(grid.below + above, 0.0, 2.0**bits - 1)


def hard(v: Array) -> Array:
    """[V >= 0]: 0.0 or 1.0."""
    return (v >= 0).astype(jnp.float32)


def penalty(v: Array, power: Array) -> Array:
    """The sum of 1 - |2 h(V) - 1|^power: 0 where all is rounded."""
    return jnp.sum(1 - jnp.abs(2 * soft(v) - 1) ** power)
