"""Kernels whose rounding and scale are learned.

A kernel w is quantized to k bits on a grid that is chosen once, with a scale s0 and a
zero point z for each output channel. Its code is that of the grid value below w or of
the one above:

    u = clip(floor(w / s0 + z) + h(V), 0, 2^k - 1)      w' = (u - z) s0 f

V is learned for every value and f for every channel. While V trains,
h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) lies between 0 and 1. A growing penalty pushes
it to 0 or 1, and in the end h = [V >= 0]. V starts so that h(V) is the distance of w
from the grid value below it, in grid steps. So w' starts as w, and the rounded codes
start as the codes of w, except that halves are rounded up.

References: AdaRound (arXiv 2004.10568) and GENIE-M (arXiv 2212.04780).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax import quant

# The sigmoid is stretched and lowered, so that h reaches 0 and 1.
_STRETCH = 1.2
_LOWERED = 0.1


class KernelGrid(NamedTuple):
    """The grid that a kernel is rounded to.

    Attributes:
      below: the code of the grid value below each value of the kernel, float32, not
        clipped, in the kernel's shape.
      scale: s0; broadcasts to the kernel's shape.
      zero_point: z, integers in float32; broadcasts to the kernel's shape.
    """

    below: Array
    scale: Array
    zero_point: Array


def start(
    kernel: Array,
    bits: int,
    shrink: Array | None,
    out_axes: tuple[int, ...],
    symmetric: bool = False,
) -> tuple[KernelGrid, Array]:
    """Make the grid of a kernel and the initial V.

    Args:
      kernel: see `quant.kernel_range`.
      bits: k, from 2 to 8.
      shrink: see `quant.kernel_range`.
      out_axes: axes of the output channels.
      symmetric: whether the range is symmetric, see `quant.kernel_range`.
    """
    ends = quant.kernel_range(kernel, shrink, out_axes, bits if symmetric else None)
    inverse_scale, scale, first = quant.grid(*ends, bits)
    place = inverse_scale * kernel - first
    below = jnp.floor(place)
    v = -jnp.log(_STRETCH / (place - below + _LOWERED) - 1)
    return KernelGrid(below, scale, -first), v


def soft(v: Array) -> Array:
    """Compute h(V), in [0, 1]."""
    return jnp.clip(_STRETCH * jax.nn.sigmoid(v) - _LOWERED, 0.0, 1.0)


def codes(grid: KernelGrid, above: Array, bits: int) -> Array:
    """Compute the codes u; they are integers where `above` is.

    Args:
      grid: the kernel's grid.
      above: h, 0 or 1, or between them while V trains.
      bits: k, from 2 to 8.
    """
    return jnp.clip(grid.below + above, 0.0, 2.0**bits - 1)


def hard(v: Array) -> Array:
    """Compute [V >= 0], 0.0 or 1.0."""
    return (v >= 0).astype(jnp.float32)


def penalty(v: Array, power: Array) -> Array:
    """Compute the sum of 1 - |2 h(V) - 1|^power, which is 0 where all h are 0 or 1."""
    return jnp.sum(1 - jnp.abs(2 * soft(v) - 1) ** power)
