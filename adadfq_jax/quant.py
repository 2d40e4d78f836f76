"""Fake quantization with the straight-through estimator, and the ranges it uses.

Everything here is a pure function of arrays or pytrees. A tensor is quantized
to k bits on a range [lo, hi] by

    s  = (2^k - 1) / max(hi - lo, 1e-8)          codes per unit
    z  = round(s * lo) + 2^(k-1)                 offset
    q  = clip(round(s * x - z), -2^(k-1), 2^(k-1) - 1)     code
    x' = (q + z) / s                             fake-quantized value

with halves rounded to even. The gradient reaches x unchanged everywhere,
clipped values included, and never reaches lo or hi (released code of AdaDFQ,
arXiv 2303.06869; the paper states the quantizer only in words).

The last line is computed as (q + z) * (1/s): XLA's division is not the correctly
rounded one, a product is, so that a kernel rebuilt elsewhere from q, z and 1/s is
the same bit for bit.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

LAST = (-1,)  # the axis of the output channels in Flax's kernels
RANGE_DECAY = 0.9  # of the moving average of activation ranges (released code)


class _Released(NamedTuple):
    """Signed codes and what maps values to them, as the released code has them.

    codes: q. inverse_scale: s. scale: 1/s. offset: z. float32, all but s integral.
    """

    codes: Array
    inverse_scale: Array
    scale: Array
    offset: Array


def _quantize_as_released(x: Array, lo: Array, hi: Array, bits: int) -> _Released:
    """q = clip(round(s * x - z), -2^(k-1), 2^(k-1) - 1), see the module docstring."""
    half = 2.0 ** (bits - 1)
    inverse_scale, scale, first = grid(lo, hi, bits)
    offset = first + half
    codes = jnp.clip(jnp.round(inverse_scale * x - offset), -half, half - 1)
    return _Released(codes, inverse_scale, scale, offset)


class Grid(NamedTuple):
    """The steps of a range: s, codes per unit, 1/s, and round(s * lo), float32.

    The step nearest to x has the unsigned code round(s * x) - first.
    """

    inverse_scale: Array
    scale: Array
    first: Array


def grid(lo: Array, hi: Array, bits: int) -> Grid:
    """The grid of a range [lo, hi] at 2 to 8 bits, see the module docstring."""
    width = jnp.maximum(hi - lo, 1e-8)
    levels = 2.0**bits - 1
    inverse_scale = levels / width
    return Grid(inverse_scale, width * (1 / levels), jnp.round(inverse_scale * lo))


class Integers(NamedTuple):
    """Unsigned codes and what they stand for: x' = (codes - zero_point) * scale.

    codes: uint8, in [0, 2^k - 1]. scale: float32, units per code. zero_point: float32,
    integral; it lies outside of the codes where the range does not hold 0. The last two
    have the shape of the range.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray


def to_integers(x: ArrayLike, lo: ArrayLike, hi: ArrayLike, bits: int) -> Integers:
    """The integers that `fake_quant` rounds to, in the terms of ONNX and PyTorch.

    u = q + 2^(k-1), zero_point = 2^(k-1) - z = -round(s * lo), scale = 1/s: then
    (u - zero_point) * scale is `fake_quant`'s value bit for bit, unless all values of a
    range are so nearly the same that its zero point is beyond 2^24.

    Args:
      x: values, any shape.
      lo: smallest value of the range; broadcasts against x.
      hi: largest value of the range, shape of `lo`.
      bits: k, from 2 to 8.

    Returns:
      `Integers`, on the host.
    """
    ends = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    return _to_integers(_quantize_as_released_jit(jnp.asarray(x), *ends, bits), bits)


_quantize_as_released_jit = jax.jit(_quantize_as_released, static_argnums=3)


def _to_integers(released: _Released, bits: int) -> Integers:
    found: Any = jax.device_get(released)
    half = np.float32(2 ** (bits - 1))
    codes = (found.codes + half).astype(np.uint8)
    return Integers(codes, found.scale, half - found.offset)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _quantize_kernel_as_released(
    kernel: Array, bits: int, shrink: Array | None, out_axes: tuple[int, ...]
) -> _Released:
    # One program, as in the step: apart, XLA rounds a shrunken range another way.
    return _quantize_as_released(kernel, *kernel_range(kernel, shrink, out_axes), bits)


def kernel_integers(
    kernel: Array,
    bits: int,
    shrink: Array | None = None,
    out_axes: tuple[int, ...] = LAST,
) -> Integers:
    """`to_integers` of a kernel on each output channel's own range.

    Args:
      kernel: see `kernel_range`.
      bits: k, from 2 to 8.
      shrink: see `kernel_range`.
      out_axes: see `kernel_range`.

    Returns:
      `Integers`, with scale and zero_point [out].
    """
    found = _quantize_kernel_as_released(jnp.asarray(kernel), bits, shrink, out_axes)
    codes, scale, zero_point = _to_integers(found, bits)
    return Integers(codes, scale.reshape(-1), zero_point.reshape(-1))


@jax.custom_jvp
def _straight_through(x: Array, quantized: Array) -> Array:
    del x
    return quantized


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # Exactly `quantized` forwards (x + stop_gradient(quantized - x) would not
    # be, in floating point), exactly the identity backwards.
    x_dot, _ = tangents
    return primals[1], x_dot


def fake_quant(
    x: Array,
    lo: Array,
    hi: Array,
    bits: int,
    *,
    masked: bool = False,
    learned: bool = False,
) -> Array:
    """Rounds x to the 2^bits values of the range [lo, hi]; straight through.

    x' = (clip(round(s * x - z), -2^(k-1), 2^(k-1) - 1) + z) / s, see the module
    docstring. d x'/d x = 1 everywhere; d x'/d lo = d x'/d hi = 0.

    `masked` makes d x'/d x = 0 where x is clipped. `learned` does too, and with
    n = 2^k - 1 and e = code - (s * x - z), the rounding error in steps, has (LSQ+,
    Bhalgat et al. 2020, arXiv 2004.09576, with its gradient scale 1 / sqrt(size n))

                       x below   inside    x above
        d x'/d lo         1      -e / n       0
        d x'/d hi         0       e / n       1

    Args:
      x: values to quantize, any shape.
      lo: smallest value of the range; broadcasts against x.
      hi: largest value of the range; broadcasts against x.
      bits: k, from 2 to 8.
      masked: see above.
      learned: see above.

    Returns:
      An array of the shape and dtype of x.
    """
    lo, hi = jnp.asarray(lo), jnp.asarray(hi)
    codes, inverse_scale, scale, offset = _quantize_as_released(x, lo, hi, bits)
    followed = x  # what the gradient follows
    if masked or learned:
        error = codes - (inverse_scale * x - offset)
        inside = jnp.abs(error) <= 0.5
        followed = jnp.where(inside, x, jax.lax.stop_gradient(x))
    if learned:
        steps = 2.0**bits - 1
        part = jnp.where(inside, error / steps, 0)
        by_lo = jnp.where(error > 0.5, 1, -part)  # clipped up
        by_hi = jnp.where(error < -0.5, 1, part)
        factor = (x.size * steps) ** -0.5
        by_lo, by_hi = jax.lax.stop_gradient((factor * by_lo, factor * by_hi))
        followed = followed + by_lo * lo + by_hi * hi
    return _straight_through(followed, (codes + offset) * scale)


SHRINKS = tuple(1 - 0.05 * i for i in range(13))  # of a range, for the least error
_SAMPLE = 16384  # most values that percentiles are taken of
PERCENTILES = (0.05, 99.95)
_ERROR_POWERS = {"mse": 2, "l3": 3}
_FEWEST_AT_TWO_BITS = 32  # values of a shrunken channel; a depthwise 3x3 has nine


def least_error_shrink(
    x: Array,
    lo: Array,
    hi: Array,
    bits: int,
    axes: tuple[int, ...],
    *,
    power: int = 2,
) -> Array:
    """Of the c in `SHRINKS` that for which c * [lo, hi] has the least error.

    The error is the sum of |x' - x|^p. Squares let the many small values outvote the
    few large ones that carry the picture; a higher power clips less (Nahshan et al.
    2019, arXiv 1911.07190, choose p for each network; ours is one for all).

    Args:
      x: values that are quantized.
      lo: smallest values over `axes`, which are kept with length 1, or scalar.
      hi: largest values, shape of `lo`.
      bits: k, from 2 to 8.
      axes: over which the error is summed.
      power: p.

    Returns:
      c, shape of `lo`.
    """
    keep = jnp.ndim(lo) > 0

    def better(best, shrink):
        error, at = best
        tried = fake_quant(x, shrink * lo, shrink * hi, bits)
        found = jnp.sum(jnp.abs(x - tried) ** power, axes, keepdims=keep)
        less = found < error
        return (jnp.where(less, found, error), jnp.where(less, shrink, at)), None

    start = (jnp.full_like(lo, jnp.inf), jnp.ones_like(lo))
    (_, shrink), _ = jax.lax.scan(better, start, jnp.asarray(SHRINKS, x.dtype))
    return shrink


def observed_range(x: Array, bits: int, how: str) -> tuple[Array, Array]:
    """The range that one batch of activations asks for; scalars.

    Args:
      x: activations, any shape.
      bits: k, from 2 to 8.
      how: 'minmax'; 'percentile', of an even sample of x; 'mse' or 'l3', the shrunken
        minimum and maximum of the least squared or cubed error.
    """
    if how == "percentile":
        stride = max(1, x.size // _SAMPLE)
        while math.gcd(stride, x.shape[-1]) > 1:  # else some channels are never seen
            stride += 1
        lo, hi = jnp.percentile(x.reshape(-1)[::stride], jnp.asarray(PERCENTILES))
        return lo, hi
    lo, hi = jnp.min(x), jnp.max(x)
    if how in _ERROR_POWERS:
        axes, power = tuple(range(x.ndim)), _ERROR_POWERS[how]
        shrink = least_error_shrink(x, lo, hi, bits, axes, power=power)
        return shrink * lo, shrink * hi
    return lo, hi


def along(values: Any, shape: tuple[int, ...], out_axes: tuple[int, ...]) -> Any:
    """Values [out] in the rank of a kernel of a shape, along its output axes."""
    axes = {axis % len(shape) for axis in out_axes}
    return values.reshape([n if i in axes else 1 for i, n in enumerate(shape)])


def _inner_axes(kernel: Array, out_axes: tuple[int, ...]) -> tuple[int, ...]:
    outer = {axis % kernel.ndim for axis in out_axes}
    return tuple(axis for axis in range(kernel.ndim) if axis not in outer)


def kernel_range(
    kernel: Array, shrink: Array | None = None, out_axes: tuple[int, ...] = LAST
) -> tuple[Array, Array]:
    """Range of each output channel: its minimum and maximum, times `shrink`.

    Args:
      kernel: any shape; the others than the output axes are reduced.
      shrink: of the shape of the range, or None.
      out_axes: of the output channels.

    Returns:
      lo and hi, of the kernel's rank, of length 1 along the reduced axes.
    """
    axes = _inner_axes(kernel, out_axes)
    lo = jnp.min(kernel, axes, keepdims=True)
    hi = jnp.max(kernel, axes, keepdims=True)
    return (lo, hi) if shrink is None else (shrink * lo, shrink * hi)


def fake_quant_kernel(
    w: Array,
    bits: int,
    shrink: Array | None = None,
    out_axes: tuple[int, ...] = LAST,
) -> Array:
    """Fake-quantizes a kernel on each output channel's own range.

    Args:
      w: kernel, see `kernel_range`.
      bits: k, from 2 to 8.
      shrink: see `kernel_range`.
      out_axes: of the output channels; Flax keeps them last in all its kernels.

    Returns:
      A kernel of the same shape.
    """
    lo, hi = jax.lax.stop_gradient(kernel_range(w, shrink, out_axes))
    return fake_quant(w, lo, hi, bits)


@functools.partial(jax.jit, static_argnums=(1, 2))
def kernel_shrink(
    kernel: Array, bits: int, out_axes: tuple[int, ...] = LAST
) -> Array | None:
    """By how much each channel's range is shrunken for the least squared error.

    At 2 bits a channel of few values keeps its minimum and maximum: what is best for
    nine values of P is not for those that Q learns (a MobileNetV2: 44 instead of 83 %).

    Args:
      kernel: see `kernel_range`.
      bits: k, from 2 to 8.
      out_axes: of the output channels.

    Returns:
      For `kernel_range`; None where the range is kept.
    """
    axes = _inner_axes(kernel, out_axes)
    values = math.prod(kernel.shape[axis] for axis in axes)
    if bits == 2 and values < _FEWEST_AT_TWO_BITS:
        return None
    return least_error_shrink(kernel, *kernel_range(kernel, None, out_axes), bits, axes)


class RangeState(NamedTuple):
    """Moving average of one activation range.

    lo, hi: the averages as stored. decay_power: 0.9^n after n updates. All are
    float32 scalars; what a quantizer uses is `read_range` of it.
    """

    lo: Array
    hi: Array
    decay_power: Array


def init_range() -> RangeState:
    """The average before any update."""
    return RangeState(jnp.zeros(()), jnp.zeros(()), jnp.ones(()))


def fixed_range(lo: Array, hi: Array) -> RangeState:
    """A state that reads as exactly [lo, hi], whichever average made it."""
    return RangeState(jnp.asarray(lo), jnp.asarray(hi), jnp.zeros(()))


def _is_released(range_ema: str) -> bool:
    if range_ema not in ("corrected", "released"):
        raise ValueError(f"range_ema={range_ema!r}: must be 'corrected' or 'released'")
    return range_ema == "released"


def update_range(state: RangeState, lo: Array, hi: Array, range_ema: str) -> RangeState:
    """Moves the average by one batch minimum and maximum.

    With t = 0.9^n after this update and c the batch value:
      'corrected': m <- 0.9 m + 0.1 c, and `read_range` divides by 1 - t.
      'released':  m <- (0.9 m + 0.1 c) / (1 - t): the released code corrects the
        value that it has already corrected, which drives a constant input to
        3,945 times its value at update 21. Kept for conformance only.

    Args:
      state: the average so far.
      lo: batch minimum, scalar.
      hi: batch maximum, scalar.
      range_ema: 'corrected' or 'released'.

    Returns:
      The moved `RangeState`.
    """
    power = state.decay_power * RANGE_DECAY
    # 1 - 0.9 in float32 (0.100000024), as the recorded recursion has it.
    fresh = jnp.float32(1) - jnp.float32(RANGE_DECAY)
    new_lo = RANGE_DECAY * state.lo + fresh * lo
    new_hi = RANGE_DECAY * state.hi + fresh * hi
    if _is_released(range_ema):
        new_lo, new_hi = new_lo / (1 - power), new_hi / (1 - power)
    return RangeState(new_lo, new_hi, power)


def read_range(state: RangeState, range_ema: str) -> tuple[Array, Array]:
    """The range [lo, hi] to quantize with.

    'corrected' divides the averages by 1 - 0.9^n, as Adam does; a state that
    was never updated reads as [0, 0].
    """
    if _is_released(range_ema):
        return state.lo, state.hi
    weight = jnp.maximum(1 - state.decay_power, 1e-8)
    return state.lo / weight, state.hi / weight
