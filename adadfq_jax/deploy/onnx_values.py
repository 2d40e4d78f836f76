"""What a value of a translated network is before it is an edge of an ONNX graph."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adadfq_jax.deploy.codes import Kernel, Range
from adadfq_jax.deploy.onnx_graph import Tensor


@dataclasses.dataclass(frozen=True)
class KernelOperand:
    """Stands for an operand that is a kernel."""

    name: str
    values: Kernel | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """As the operation sees it."""
        codes = self.values
        return codes.codes.shape if isinstance(codes, Kernel) else codes.shape


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or a product with a kernel that is not in the graph yet.

    Attributes:
      operator: 'Conv', 'Gemm', or 'MatMul' of matrices for the axes before.
      x: the name of the activation.
      kernel: [out, ...].
      shape: of the result.
      order: likewise, see `Tensor`.
      channels: axes of the result that the kernel's output channels are.
      attributes: of the node.
    """

    operator: str
    x: str
    kernel: KernelOperand
    shape: tuple[int, ...]
    order: tuple[int, ...]
    channels: tuple[int, ...]
    batches: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def permuted(self, permutation: Sequence[int]) -> "Product":
        """JAX's transpose."""
        moved = Tensor("", self.shape, self.order).permuted(permutation)
        channels = tuple(permutation.index(axis) for axis in self.channels)
        return dataclasses.replace(
            self, shape=moved.shape, order=moved.order, channels=channels
        )

    def takes(self, values: np.ndarray) -> bool:
        """Whether values that are broadcast to the result are one for each channel."""
        sizes = enumerate(values.shape)
        return all(size == 1 or axis in self.channels for axis, size in sizes)

    def per_channel(self, values: np.ndarray) -> np.ndarray:
        """Those values as [out]."""
        axes = range(len(self.shape))
        sizes = [self.shape[a] if a in self.channels else 1 for a in axes]
        others = [axis for axis in axes if axis not in self.channels]
        full = np.broadcast_to(values, sizes)
        return full.transpose(*self.channels, *others).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Linear:
    """source * factor + term, both broadcast to the source."""

    source: Any
    factor: np.ndarray
    term: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """JAX's."""
        return self.source.shape


@dataclasses.dataclass(frozen=True)
class Quantized:
    """An activation's quantizer that is not in the graph yet."""

    x: Any
    parameters: Range
    whole_bytes: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """JAX's."""
        return self.x.shape


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """A reshape that is not in the graph yet; the next one may undo it."""

    source: Any
    shape: tuple[int, ...]
