"""Adaptive data-free quantization (AdaDFQ, CVPR 2023) in JAX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adadfq_jax.export import QuantizedNetwork

__version__ = "0.1.0"


def load_quantized(path: str | Path) -> QuantizedNetwork:
    """Q from a `quantized.safetensors`, as a function of images.

    Args:
      path: the file.

    Returns:
      A callable on images [B, H, W, C] in normalised space, (pixels / 255 - mean) /
      std, that gives logits [B, num_classes]; with `weight_bits`, `act_bits`, `ranges`
      (lo and hi by activation quantizer), `num_classes`, `image_shape`, `mean`, `std`.

    Raises:
      adadfq_jax.errors.InputError: the file is missing, damaged or not of this format.
    """
    from adadfq_jax import export  # here, so that the package imports without JAX

    return export.load_quantized(path)
