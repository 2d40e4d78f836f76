"""Fake quantization with the straight-through estimator, and the ranges it uses.

All functions are pure functions of arrays or pytrees. A tensor is quantized to k bits
on a range [lo, hi] by

    s  = (2^k - 1) / max(hi - lo, 1e-8)          codes per unit
    z  = round(s * lo) + 2^(k-1)                 offset
    q  = clip(round(s * x - z), -2^(k-1), 2^(k-1) - 1)     code
    x' = (q + z) / s                             fake-quantized value

with halves rounded to even. The gradient passes to x unchanged everywhere, also where x
is clipped, and it never passes to lo or hi (released code of AdaDFQ, arXiv 2303.06869;
the paper describes the quantizer only in words).

The last line is computed as (q + z) * (1/s). XLA rounds a product correctly, but not a
division, so a kernel that is rebuilt elsewhere from q, z and 1/s is the same bit for
bit.
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
RANGE_DECAY = 0.9  # decay of the moving average of activation ranges (released code)


class _Released(NamedTuple):
    """Signed codes and the numbers that map values to them, as in the released code.

    Attributes:
      codes: q, integers in float32.
      inverse_scale: s, float32.
      scale: 1/s, float32.
      offset: z, integers in float32.
    """

    codes: Array
    inverse_scale: Array
    scale: Array
    offset: Array


def _quantize_as_released(
    x: Array, lo: Array, hi: Array, bits: int | Array
) -> _Released:
    """Compute q = clip(round(s * x - z), -2^(k-1), 2^(k-1) - 1) with its s and z."""
    half = _power_of_2(bits) / 2
    inverse_scale, scale, first = grid(lo, hi, bits)
    offset = first + half
    codes = jnp.clip(jnp.round(inverse_scale * x - offset), -half, half - 1)
    return _Released(codes, inverse_scale, scale, offset)


class Grid(NamedTuple):
    """The grid of values that x is rounded to on a range; all numbers are float32.

    The grid value nearest to x has the unsigned code round(s * x) - first.

    Attributes:
      inverse_scale: s, codes per unit.
      scale: 1/s, units per code.
      first: round(s * lo).
    """

    inverse_scale: Array
    scale: Array
    first: Array


def _power_of_2(bits: int | Array) -> float | Array:
    """Compute 2^bits exactly; a number of bits may be traced, as an int32 scalar."""
    return 2.0**bits if isinstance(bits, int) else jnp.ldexp(jnp.float32(1), bits)


def grid(lo: Array, hi: Array, bits: int | Array) -> Grid:
    """Compute the grid of a range [lo, hi] at 2 to 8 bits, see the module docstring."""
    width = jnp.maximum(hi - lo, 1e-8)
    levels = _power_of_2(bits) - 1
    inverse_scale = levels / width
    return Grid(inverse_scale, width * (1 / levels), jnp.round(inverse_scale * lo))


class Integers(NamedTuple):
    """Unsigned codes and the values they stand for: x' = (codes - zero_point) * scale.

    Attributes:
      codes: uint8, in [0, 2^k - 1].
      scale: float32, units per code, in the shape of the range.
      zero_point: integers in float32, in the shape of the range. It is no valid code
        where the range does not hold 0.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray


def to_integers(x: ArrayLike, lo: ArrayLike, hi: ArrayLike, bits: int) -> Integers:
    """Compute the integers that `fake_quant` rounds to, in ONNX's and PyTorch's terms.

    u = q + 2^(k-1), zero_point = 2^(k-1) - z = -round(s * lo) and scale = 1/s, so that
    (u - zero_point) * scale is `fake_quant`'s value bit for bit. The exception is a
    range so narrow, compared with its distance from 0, that its zero point is beyond
    2^24.

    Args:
      x: values, any shape.
      lo: smallest value of the range; broadcasts against x.
      hi: largest value of the range, in the shape of `lo`.
      bits: k, from 2 to 8.

    Returns:
      `Integers`, as arrays on the host.
    """
    ends = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    return _to_integers(_quantize_as_released_jit(jnp.asarray(x), *ends, bits), bits)


_quantize_as_released_jit = jax.jit(_quantize_as_released, static_argnums=3)


def _to_integers(released: _Released, bits: int) -> Integers:
    found: Any = jax.device_get(released)
    half = np.float32(2 ** (bits - 1))
    codes = (found.codes + half).astype(np.uint8)
    return Integers(codes, found.scale, half - found.offset)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _quantize_kernel_as_released(
    kernel: Array,
    bits: int,
    shrink: Array | None,
    out_axes: tuple[int, ...],
    symmetric: bool,
) -> _Released:
    # The range is narrowed in the same program, as in the step: XLA would round it
    # differently in a separate program.
    ends = kernel_range(kernel, shrink, out_axes, bits if symmetric else None)
    return _quantize_as_released(kernel, *ends, bits)


def kernel_integers(
    kernel: Array,
    bits: int,
    shrink: Array | None = None,
    out_axes: tuple[int, ...] = LAST,
    symmetric: bool = False,
) -> Integers:
    """Compute `to_integers` of a kernel, on the range of each output channel.

    Args:
      kernel: see `kernel_range`.
      bits: k, from 2 to 8.
      shrink: see `kernel_range`.
      out_axes: see `kernel_range`.
      symmetric: whether the range is symmetric, see `kernel_range`.

    Returns:
      `Integers`, with scale and zero_point of shape [out].
    """
    found = _quantize_kernel_as_released(
        jnp.asarray(kernel), bits, shrink, out_axes, symmetric
    )
    codes, scale, zero_point = _to_integers(found, bits)
    return Integers(codes, scale.reshape(-1), zero_point.reshape(-1))


@jax.custom_jvp
def _straight_through(x: Array, quantized: Array) -> Array:
    del x
    return quantized


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # The value is exactly `quantized`, which x + stop_gradient(quantized - x) would not
    # be in floating point, and the derivative is exactly the identity.
    x_dot, _ = tangents
    return primals[1], x_dot


def fake_quant(
    x: Array,
    lo: Array,
    hi: Array,
    bits: int | Array,
    *,
    masked: bool = False,
    learned: bool = False,
) -> Array:
    """Round x to the 2^bits values of [lo, hi], with a straight-through gradient.

    x' = (clip(round(s * x - z), -2^(k-1), 2^(k-1) - 1) + z) / s, see the module
    docstring. d x'/d x = 1 everywhere; d x'/d lo = d x'/d hi = 0.

    `masked` makes d x'/d x = 0 where x is clipped. `learned` does the same and also
    gives lo and hi the gradients of LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576), times
    its gradient scale 1 / sqrt(size n). With n = 2^k - 1 and the rounding error in
    codes, e = code - (s * x - z), they are

                       x below   inside    x above
        d x'/d lo         1      -e / n       0
        d x'/d hi         0       e / n       1

    Args:
      x: values to quantize, any shape.
      lo: smallest value of the range; broadcasts against x.
      hi: largest value of the range; broadcasts against x.
      bits: k, from 2 to 8; unless `learned`, it may be traced.
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


SHRINKS = tuple(1 - 0.05 * i for i in range(13))  # the clip ratios that are tried
# A channel of fewer values is not clipped at 2 bits; a depthwise 3x3 kernel has nine.
_FEWEST_AT_TWO_BITS = 32


def least_error_shrink(
    x: Array,
    lo: Array,
    hi: Array,
    bits: int | Array,
    axes: tuple[int, ...],
    *,
    power: int = 2,
    axis_name: str | None = None,
) -> Array:
    """Return the clip ratio c of `SHRINKS` for which c * [lo, hi] has the least error.

    The error is the sum of |x' - x|^p. With squares the many small values count for
    more than the few large ones, which carry the picture; a higher power clips less
    (Nahshan et al. 2019, arXiv 1911.07190, choose p for each network; here one p serves
    all networks).

    Args:
      x: values that are quantized.
      lo: smallest values over `axes`, which are kept with length 1, or a scalar.
      hi: largest values, in the shape of `lo`.
      bits: k, from 2 to 8.
      axes: axes over which the error is summed.
      power: p.
      axis_name: mapped axis over which the error is summed as well, or None.

    Returns:
      c, in the shape of `lo`.
    """
    keep = jnp.ndim(lo) > 0

    def error(shrink):
        tried = fake_quant(x, shrink * lo, shrink * hi, bits)
        return jnp.sum(jnp.abs(x - tried) ** power, axes, keepdims=keep)

    shrinks = jnp.asarray(SHRINKS, x.dtype)
    errors = jax.lax.map(error, shrinks)
    if axis_name is not None:
        errors = jax.lax.psum(errors, axis_name)
    return shrinks[jnp.argmin(errors, axis=0)]


def observed_range(
    x: Array, bits: int | Array, how: str, axis_name: str | None = None
) -> tuple[Array, Array]:
    """Compute the range (lo, hi) of one batch of activations, as two scalars.

    Args:
      x: activations, any shape.
      bits: k, from 2 to 8.
      how: 'minmax', or 'l3' for the minimum and maximum times the clip ratio of the
        least cubed error.
      axis_name: mapped axis over the devices that share the batch, or None.
    """
    lo, hi = jnp.min(x), jnp.max(x)
    if axis_name is not None:
        lo, hi = jax.lax.pmin(lo, axis_name), jax.lax.pmax(hi, axis_name)
    if how == "l3":
        axes = tuple(range(x.ndim))
        shrink = least_error_shrink(x, lo, hi, bits, axes, power=3, axis_name=axis_name)
        return shrink * lo, shrink * hi
    return lo, hi


def along(values: Any, shape: tuple[int, ...], out_axes: tuple[int, ...]) -> Any:
    """Reshape values [out] so that they lie along a kernel's output axes."""
    axes = {axis % len(shape) for axis in out_axes}
    return values.reshape([n if i in axes else 1 for i, n in enumerate(shape)])


def _inner_axes(kernel: Array, out_axes: tuple[int, ...]) -> tuple[int, ...]:
    outer = {axis % kernel.ndim for axis in out_axes}
    return tuple(axis for axis in range(kernel.ndim) if axis not in outer)


def kernel_range(
    kernel: Array,
    shrink: Array | None = None,
    out_axes: tuple[int, ...] = LAST,
    symmetric_bits: int | Array | None = None,
) -> tuple[Array, Array]:
    """Return each output channel's range: its minimum and maximum times `shrink`.

    A symmetric range of k bits has the zero point 2^(k-1), so that codes minus zero
    point are signed integers. With m = max |w| it is [-m n / (n - 1), m], n = 2^(k-1):
    w itself takes the codes from -(n - 1) to n - 1, and -n is not used.

    Args:
      kernel: any shape; all axes but the output axes are reduced.
      shrink: clip ratios in the shape of the range, or None for 1.
      out_axes: axes of the output channels.
      symmetric_bits: k for a symmetric range; None for the minimum and maximum.

    Returns:
      lo and hi, in the kernel's rank, with length 1 along the reduced axes.
    """
    axes = _inner_axes(kernel, out_axes)
    lo = jnp.min(kernel, axes, keepdims=True)
    hi = jnp.max(kernel, axes, keepdims=True)
    if symmetric_bits is not None:
        half = _power_of_2(symmetric_bits) / 2
        hi = jnp.maximum(-lo, hi)
        lo = -hi * (half / (half - 1))
    return (lo, hi) if shrink is None else (shrink * lo, shrink * hi)


def fake_quant_kernel(
    w: Array,
    bits: int | Array,
    shrink: Array | None = None,
    out_axes: tuple[int, ...] = LAST,
    symmetric: bool = False,
) -> Array:
    """Fake-quantize a kernel on each output channel's own range.

    Args:
      w: kernel, see `kernel_range`.
      bits: k, from 2 to 8.
      shrink: see `kernel_range`.
      out_axes: axes of the output channels; Flax has them last in all its kernels.
      symmetric: whether the range is symmetric, see `kernel_range`.

    Returns:
      A kernel of the same shape.
    """
    ends = kernel_range(w, shrink, out_axes, bits if symmetric else None)
    lo, hi = jax.lax.stop_gradient(ends)
    return fake_quant(w, lo, hi, bits)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def kernel_shrink(
    kernel: Array,
    bits: int,
    out_axes: tuple[int, ...] = LAST,
    symmetric: bool = False,
) -> Array | None:
    """Return each channel's clip ratio with the least squared error.

    At 2 bits a channel of few values keeps its minimum and maximum: a ratio that is
    best for the few values of P is not good for those that Q learns.

    Args:
      kernel: see `kernel_range`.
      bits: k, from 2 to 8.
      out_axes: axes of the output channels.
      symmetric: whether the range is symmetric, see `kernel_range`.

    Returns:
      The `shrink` of `kernel_range`; None where the range is kept.
    """
    if not is_clipped(kernel.shape, bits, out_axes):
        return None
    return least_error_kernel_shrink(kernel, bits, out_axes, symmetric)


def is_clipped(shape: tuple[int, ...], bits: int, out_axes: tuple[int, ...]) -> bool:
    """Tell whether `kernel_shrink` chooses clip ratios for a kernel of this shape."""
    outer = {axis % len(shape) for axis in out_axes}
    values = math.prod(n for axis, n in enumerate(shape) if axis not in outer)
    return bits != 2 or values >= _FEWEST_AT_TWO_BITS


def least_error_kernel_shrink(
    kernel: Array,
    bits: int | Array,
    out_axes: tuple[int, ...],
    symmetric: bool = False,
) -> Array:
    """Return each channel's clip ratio with the least squared error.

    Args:
      kernel: see `kernel_range`.
      bits: k, from 2 to 8; it may be traced.
      out_axes: axes of the output channels.
      symmetric: whether the range is symmetric, see `kernel_range`.
    """
    axes = _inner_axes(kernel, out_axes)
    ends = kernel_range(kernel, None, out_axes, bits if symmetric else None)
    return least_error_shrink(kernel, *ends, bits, axes)


class RangeState(NamedTuple):
    """Moving average of one activation range; a quantizer uses its `read_range`.

    Attributes:
      lo: stored average of the minima, float32 scalar.
      hi: stored average of the maxima, float32 scalar.
      decay_power: 0.9^n after n updates, float32 scalar.
    """

    lo: Array
    hi: Array
    decay_power: Array


def init_range() -> RangeState:
    """Return the average before any update."""
    return RangeState(jnp.zeros(()), jnp.zeros(()), jnp.ones(()))


def fixed_range(lo: Array, hi: Array) -> RangeState:
    """Return a state whose `read_range` is exactly (lo, hi), with either average."""
    return RangeState(jnp.asarray(lo), jnp.asarray(hi), jnp.zeros(()))


def _is_released(range_ema: str) -> bool:
    if range_ema not in ("corrected", "released"):
        raise ValueError(f"range_ema={range_ema!r}: must be 'corrected' or 'released'")
    return range_ema == "released"


def update_range(state: RangeState, lo: Array, hi: Array, range_ema: str) -> RangeState:
    """Move the average by one batch minimum and maximum.

    With t = 0.9^n after this update and c the batch value:
      'corrected': m <- 0.9 m + 0.1 c, and `read_range` divides by 1 - t.
      'released':  m <- (0.9 m + 0.1 c) / (1 - t). The released code corrects the value
        that it has already corrected, so the average of a constant input grows far
        beyond that input. This form is for conformance only.

    Args:
      state: the average so far.
      lo: batch minimum, scalar.
      hi: batch maximum, scalar.
      range_ema: 'corrected' or 'released'.

    Returns:
      The moved `RangeState`.
    """
    power = state.decay_power * RANGE_DECAY
    # This is 1 - 0.9 in float32 (0.100000024), as in the recorded numbers.
    fresh = jnp.float32(1) - jnp.float32(RANGE_DECAY)
    new_lo = RANGE_DECAY * state.lo + fresh * lo
    new_hi = RANGE_DECAY * state.hi + fresh * hi
    if _is_released(range_ema):
        new_lo, new_hi = new_lo / (1 - power), new_hi / (1 - power)
    return RangeState(new_lo, new_hi, power)


def read_range(state: RangeState, range_ema: str) -> tuple[Array, Array]:
    """Return the range (lo, hi) to quantize with.

    'corrected' divides the averages by 1 - 0.9^n, as Adam does. A state that was never
    updated is read as (0, 0).
    """
    if _is_released(range_ema):
        return state.lo, state.hi
    weight = jnp.maximum(1 - state.decay_power, 1e-8)
    return state.lo / weight, state.hi / weight
