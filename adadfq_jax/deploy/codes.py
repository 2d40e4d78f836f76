"""Integers of a quantized network: kernels, activations' ranges, and packed codes.

Codes are unsigned, u in [0, 2^k - 1], and stand for (u - zero_point) * scale. Where a
range does not contain 0, the zero point lies outside [0, 2^k - 1], which no runtime
accepts. Then 0 is stored as zero point, and offset = -zero_point * scale is added.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from adadfq_jax import quant


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes of k bits each, without gaps, least significant bit first.

    Args:
      codes: uint8, any shape; they are packed in row-major order.
      bits: k, from 1 to 8.

    Returns:
      uint8 [ceil(size * k / 8)]; zero bits fill the last byte.
    """
    each = np.unpackbits(codes.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(each, bitorder="little")


def unpack_codes(packed: np.ndarray, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Unpack the bytes of `pack_codes` into uint8 codes of the given shape."""
    size = int(np.prod(shape))
    each = np.unpackbits(packed, count=size * bits, bitorder="little").reshape(-1, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0].reshape(shape)


def storage_bits(bits: int) -> int:
    """Return the narrowest width of 2, 4 and 8 bits that holds k bits."""
    return next(width for width in (2, 4, 8) if width >= bits)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A quantized kernel: (codes - zero_point) * scale, per output channel.

    Attributes:
      codes: uint8, in [0, 2^k - 1], in the kernel's shape.
      scale: float32 [out], units per code, above 0.
      zero_point: [out], whole numbers.
      bits: k.
      out_axes: the axes of the output channels; out is the product of their lengths,
        in row-major order.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bits: int
    out_axes: tuple[int, ...] = (-1,)

    def per_channel(self, values: np.ndarray) -> np.ndarray:
        """Reshape values [out] to the kernel's rank, along its output axes."""
        return quant.along(values, self.codes.shape, self.out_axes)

    def dequantize(self) -> np.ndarray:
        """Return the kernel in float32."""
        # In float64, the difference is rounded once, however large the zero point is.
        steps = self.codes.astype(np.float64) - self.per_channel(self.zero_point)
        return steps.astype(np.float32) * self.per_channel(self.scale)

    def scaled(self, factor: np.ndarray | float) -> "Kernel":
        """Multiply the kernel by a factor per output channel, without an operation.

        Where the factor is negative, the codes are reversed, u -> 2^k - 1 - u, and the
        scale stays positive. Where the factor is 0, all codes and zero points are 0.

        Args:
          factor: float32, broadcast to [out].
        """
        top = 2**self.bits - 1
        factor = np.broadcast_to(np.float32(factor), self.scale.shape)
        negative = self.per_channel(factor < 0)
        codes = np.where(negative, top - self.codes, self.codes)
        zero_point = np.where(factor < 0, top - self.zero_point, self.zero_point)
        is_zero = factor == 0
        scale = self.scale * np.where(is_zero, np.float32(1), np.abs(factor))
        return Kernel(
            np.where(self.per_channel(is_zero), 0, codes).astype(np.uint8),
            scale.astype(np.float32),
            np.where(is_zero, 0, zero_point),
            self.bits,
            self.out_axes,
        )

    @property
    def stored_zero_point(self) -> np.ndarray:
        """The zero point where it is a code, else 0: uint8 [out]."""
        return np.where(self._holds_zero, self.zero_point, 0).astype(np.uint8)

    @property
    def offset(self) -> np.ndarray:
        """The term to add where the zero point is not stored, else 0: float32 [out]."""
        beyond = (-self.zero_point * self.scale).astype(np.float32)
        return np.where(self._holds_zero, np.float32(0), beyond)

    @property
    def _holds_zero(self) -> np.ndarray:
        return (self.zero_point >= 0) & (self.zero_point <= 2**self.bits - 1)


class Range(NamedTuple):
    """An activation's range at k bits: (code - zero_point) * scale + offset.

    Attributes:
      scale: units per code.
      zero_point: a code, in [0, 2^k - 1].
      offset: the term that replaces a zero point outside the codes, see the module.
      bits: k.
    """

    scale: np.float32
    zero_point: int
    offset: np.float32
    bits: int


def quantize_range(lo: float, hi: float, bits: int) -> Range:
    """Return the scale, zero point and offset of activations on [lo, hi]."""
    found = quant.to_integers(np.float32(0), lo, hi, bits)
    scale, zero_point = np.float32(found.scale), float(found.zero_point)
    if 0 <= zero_point <= 2**bits - 1:
        return Range(scale, int(zero_point), np.float32(0), bits)
    return Range(scale, 0, np.float32(-zero_point * scale), bits)
