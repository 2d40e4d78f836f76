"""Values of a translated network that are not yet edges of an ONNX graph."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adadfq_jax.deploy.codes import Kernel, Range
from adadfq_jax.deploy.onnx_graph import Tensor


@dataclasses.dataclass(frozen=True)
class KernelOperand:
    """An operand that is a kernel.

    Attributes:
      name: of the kernel in the graph.
      values: the codes, or float32.
    """

    name: str
    values: Kernel | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the operation reads."""
        array = self.values
        return array.codes.shape if isinstance(array, Kernel) else array.shape


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution of, or a product with, a kernel that is not in the graph yet.

    Attributes:
      operator: 'Conv', 'Gemm', or 'MatMul' for products with batch axes.
      x: name of the activation's edge.
      kernel: [out, ...].
      shape: of the result, as JAX has it.
      order: of the result, see `Tensor`.
      channels: axes of the result that hold the kernel's output channels.
      batches: lengths of the batch axes of a 'MatMul'.
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
        """Transpose the result as JAX does."""
        moved = Tensor("", self.shape, self.order).permuted(permutation)
        channels = tuple(permutation.index(axis) for axis in self.channels)
        return dataclasses.replace(
            self, shape=moved.shape, order=moved.order, channels=channels
        )

    def takes(self, values: np.ndarray) -> bool:
        """Tell whether values that broadcast to the result vary by channel alone."""
        sizes = enumerate(values.shape)
        return all(size == 1 or axis in self.channels for axis, size in sizes)

    def per_channel(self, values: np.ndarray) -> np.ndarray:
        """Return values that vary by channel alone as [out]."""
        axes = range(len(self.shape))
        sizes = [self.shape[a] if a in self.channels else 1 for a in axes]
        others = [axis for axis in axes if axis not in self.channels]
        full = np.broadcast_to(values, sizes)
        return full.transpose(*self.channels, *others).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Linear:
    """The value source * factor + term.

    Attributes:
      source: any value that is no array, such as a `Tensor` or a `Product`.
      factor: broadcast to the source.
      term: likewise.
    """

    source: Any
    factor: np.ndarray
    term: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, as JAX has it."""
        return self.source.shape


@dataclasses.dataclass(frozen=True)
class Quantized:
    """An activation's quantizer that is not in the graph yet.

    Attributes:
      x: the value that it quantizes.
      parameters: its range.
      whole_bytes: whether each code takes a byte, however few its bits.
    """

    x: Any
    parameters: Range
    whole_bytes: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, as JAX has it."""
        return self.x.shape


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """A reshape that is not in the graph yet; the next one may undo it."""

    source: Any
    shape: tuple[int, ...]
