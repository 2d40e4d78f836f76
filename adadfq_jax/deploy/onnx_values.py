"""What a jaxpr's variables are while it is translated, beside constants and edges."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from adadfq_jax.deploy.codes import UnsignedRange
from adadfq_jax.deploy.network import Kernel
from adadfq_jax.deploy.onnx_graph import Tensor


@dataclasses.dataclass(frozen=True)
class NamedKernel:
    """A kernel as an argument of the jaxpr: codes, or a float32 array."""

    name: str
    kernel: Kernel | np.ndarray


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or a dense layer that is not in the graph yet."""

    operator: str
    x: str
    kernel: NamedKernel
    shape: tuple[int, ...]
    attributes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Linear:
    """source * factor + term, per channel (the last axis) or for all of them."""

    source: Product | Tensor
    factor: np.ndarray
    term: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Flax's."""
        return self.source.shape


@dataclasses.dataclass(frozen=True)
class Quantized:
    """An activation's quantizer that is not in the graph yet."""

    x: Tensor
    parameters: UnsignedRange
    whole_bytes: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Flax's."""
        return self.x.shape
