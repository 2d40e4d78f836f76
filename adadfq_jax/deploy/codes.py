"""Kernels and activations as ONNX and StableHLO hold them: unsigned codes.

A code of our format is q in [-2^(k-1), 2^(k-1) - 1] and stands for (q + z) / s. The
unsigned u = q + 2^(k-1) in [0, 2^k - 1] stands for (u - zero_point) * scale, where
zero_point = 2^(k-1) - z = -round(s * lo) and scale = 1 / s. Where [lo, hi] does not
contain 0 that zero point lies outside of the codes, and no runtime takes it; then it is
0, and offset = -zero_point * scale is added explicitly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import quant
from adadfq_jax.deploy.network import Kernel


def storage_bits(bits: int) -> int:
    """The narrowest of 2, 4 and 8 bits that holds k bits."""
    return next(width for width in (2, 4, 8) if width >= bits)


class UnsignedKernel(NamedTuple):
    """A kernel as unsigned codes: (codes - zero_point) * scale + offset.

    codes: uint8 [..., out]. zero_point: uint8 [out]. scale, offset: float32 [out].
    bits: k.
    """

    codes: np.ndarray
    zero_point: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    bits: int


def unsigned_kernel(kernel: Kernel, factor: np.ndarray | float = 1.0) -> UnsignedKernel:
    """A kernel times a factor per output channel, as unsigned codes.

    A batch norm's factor so costs nothing. Where it is negative the codes are turned
    around, u -> 2^k - 1 - u, and the scale stays positive; where it is 0 all codes are
    those of 0.

    Args:
      kernel: codes, scale and zero point of our format.
      factor: float32, broadcasts to [out].
    """
    half, top = 2.0 ** (kernel.bits - 1), 2.0**kernel.bits - 1
    factor = np.broadcast_to(np.float32(factor), kernel.scale.shape)
    codes = kernel.codes + half
    zero_point = half - kernel.zero_point
    codes = np.where(factor < 0, top - codes, codes)
    zero_point = np.where(factor < 0, top - zero_point, zero_point)
    gone = factor == 0
    scale = kernel.scale * np.where(gone, np.float32(1), np.abs(factor))
    codes, zero_point = np.where(gone, 0, codes), np.where(gone, 0, zero_point)
    inside = (zero_point >= 0) & (zero_point <= top)
    return UnsignedKernel(
        codes.astype(np.uint8),
        np.where(inside, zero_point, 0).astype(np.uint8),
        scale.astype(np.float32),
        np.where(inside, 0, -zero_point * scale).astype(np.float32),
        kernel.bits,
    )


class UnsignedRange(NamedTuple):
    """An activation's range at k bits: (code - zero_point) * scale + offset."""

    scale: np.float32
    zero_point: int
    offset: np.float32
    bits: int


def unsigned_range(lo: float, hi: float, bits: int) -> UnsignedRange:
    """The scale, zero point and offset of activations on [lo, hi]."""
    ends = jnp.float32(lo), jnp.float32(hi)
    params = jax.device_get(quant.affine_params(*ends, bits))
    zero_point = 2.0 ** (bits - 1) - float(params.zero_point)
    if 0 <= zero_point <= 2**bits - 1:
        scale = np.float32(params.scale)
        return UnsignedRange(scale, int(zero_point), np.float32(0), bits)
    offset = np.float32(-zero_point * params.scale)
    return UnsignedRange(np.float32(params.scale), 0, offset, bits)
