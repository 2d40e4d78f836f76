"""Adaptive data-free quantization (AdaDFQ, CVPR 2023) in JAX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adadfq_jax.runtime.versions import __version__ as __version__

if TYPE_CHECKING:
    import flax.linen as nn

    from adadfq_jax.api import quantize as quantize
    from adadfq_jax.deploy.network import QuantizedNetwork


def __getattr__(name: str) -> Any:
    if name == "quantize":  # here, so that the package imports without JAX
        from adadfq_jax.api import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_quantized(
    path: str | Path, model: nn.Module | None = None
) -> QuantizedNetwork:
    """Q from a `quantized.safetensors`, as a function of images.

    Args:
      path: the file.
      model: the Flax module that it is of, where that is one of your own.

    Returns:
      A callable on images [B, H, W, C] in normalised space, (pixels / 255 - mean) /
      std, that gives logits [B, num_classes]; with `weight_bits`, `act_bits`, `ranges`
      (lo and hi by activation quantizer), `num_classes`, `image_shape`, `mean`, `std`,
      `variables` and `path`.

    Raises:
      adadfq_jax.errors.InputError: the file is missing, damaged or not of this format.
    """
    from adadfq_jax.deploy import (
        quantized_file,  # here, so that the package imports without JAX
    )

    return quantized_file.load_quantized(path, model)
