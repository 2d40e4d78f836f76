"""What a traced network holds: kernels, activations, batch norms and blocks."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

from adadfq_jax.network.program import Operand, Program


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operand of a convolution or product that is computed from variables.

    Attributes:
      name: of the variable, its path joined by dots.
      shape: as the operation sees it.
      operation: 'convolution' or 'product'.
      out_axes: axes of the output channels; each channel has a range of its own.
      activation: the quantized activation that is the other operand, or ''.
      reason: why the other operand is not quantized, '' where it is.
      multiplications: for one image.
    """

    name: str
    shape: tuple[int, ...]
    operation: str
    out_axes: tuple[int, ...]
    activation: str
    reason: str
    multiplications: int

    @property
    def variable(self) -> str:
        """The name of the variable: several operations may read one."""
        return self.name.partition("#")[0]


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or product that stays in float, for it has no kernel.

    Attributes:
      operation: 'convolution' or 'product'.
      shape: of its second operand, without the batch.
      reason: why it is not quantized.
      multiplications: for one image.
    """

    operation: str
    shape: tuple[int, ...]
    reason: str
    multiplications: int


@dataclasses.dataclass(frozen=True)
class Activation:
    """A tensor that Q quantizes, once for all that read it.

    Attributes:
      name: '<first kernel that reads it>:input'.
      shape: without the batch.
      readers: names of the kernels that read it.
    """

    name: str
    shape: tuple[int, ...]
    readers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A batch norm in inference: (x - mean) / sqrt(var + epsilon).

    Attributes:
      name: of the variable that is its mean, the path without its last part.
      shape: of its input, without the batch.
      axis: of the channels in its input, of which the batch is an axis too.
      variables: names of its mean and variance, '' of one that is computed.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    variables: tuple[str, ...] = ("", "")


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of the network that is joined to the next by a single tensor.

    Attributes:
      name: of its first kernel.
      kernels: their names, in order.
      activations: names of those that are made in it.
      shape: of its output, without the batch.
    """

    name: str
    kernels: tuple[str, ...]
    activations: tuple[str, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where in a program of one batch size the entries of a graph are.

    Attributes:
      program: the flattened network.
      kernels: by (equation, operand), the index of the kernel.
      activations: index by value.
      batch_norms: for each, its input, mean and variance.
      cuts: the last value of each block.
    """

    program: Program
    kernels: dict[tuple[int, int], int]
    activations: dict[Any, int]
    batch_norms: tuple[tuple[Any, Any, Any], ...]
    cuts: tuple[Any, ...]

    @functools.cached_property
    def producers(self) -> dict[Any, int]:
        """The index of the equation that computes a value."""
        return {
            output: index
            for index, equation in enumerate(self.program.equations)
            for output in equation.outputs
        }

    def needed(
        self,
        wanted: Iterable[Operand],
        known: Collection[Any] = (),
        replaced: Collection[tuple[int, int]] = (),
    ) -> list[int]:
        """Indices of the equations that values are computed by, in order.

        Args:
          wanted: the values.
          known: values that need not be computed.
          replaced: operands that are not read, as (equation, operand).
        """
        found: set[int] = set()
        stack = list(wanted)
        while stack:
            operand = stack.pop()
            if operand in known or operand not in self.producers:
                continue
            index = self.producers[operand]
            if index not in found:
                found.add(index)
                inputs = enumerate(self.program.equations[index].inputs)
                stack += [x for side, x in inputs if (index, side) not in replaced]
        return sorted(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced network: what can be quantized in it, found in its jaxpr.

    Attributes:
      kernels: in the order of the network.
      products: those without a kernel, likewise.
      activations: likewise.
      batch_norms: likewise.
      blocks: likewise; together they are the network.
      image_shape: (H, W, channels).
      layout: of the images that the network takes, 'NHWC' or 'NCHW'.
      rule: where activations are quantized, 'nonlinearities' or 'all', see `trace`.
      num_classes: length of the logits.
      variables: their names, in the order of the network's tree.
      needed: names of those that the logits are computed from.
      parameters: names of those that can be trained.
      beside_kernels: names of those that are needed where all kernels are given.
      dtype: of the images.
      traced_batch: images in the batch that it was traced with.
      notes: what is worth saying, as that a final softmax was cut off.
    """

    kernels: tuple[Kernel, ...]
    products: tuple[Product, ...]
    activations: tuple[Activation, ...]
    batch_norms: tuple[BatchNorm, ...]
    blocks: tuple[Block, ...]
    image_shape: tuple[int, ...]
    layout: str
    rule: str
    num_classes: int
    variables: tuple[str, ...]
    needed: tuple[str, ...]
    parameters: tuple[str, ...]
    beside_kernels: tuple[str, ...]
    dtype: Any
    traced_batch: int
    notes: tuple[str, ...]
    make_places: Callable[[int], Places] = dataclasses.field(repr=False)

    @functools.cached_property
    def multiplications(self) -> int:
        """Of all convolutions and products, for one image."""
        entries: tuple[Kernel | Product, ...] = (*self.kernels, *self.products)
        return sum(entry.multiplications for entry in entries)

    @functools.cached_property
    def quantized_share(self) -> float:
        """The share of multiplications of which both operands are quantized."""
        total = self.multiplications
        both = sum(k.multiplications for k in self.kernels if k.activation)
        return both / total

    def __str__(self) -> str:
        rows = [("kernel", "shape", "its input", "multiplications")]
        total = self.multiplications
        entries: tuple[Kernel | Product, ...] = (*self.kernels, *self.products)
        for entry in entries:
            name, where = f"({entry.operation})", ""
            if isinstance(entry, Kernel):
                name, where = entry.name, entry.activation
            where = where or f"not quantized: {entry.reason}"
            share = f"{100 * entry.multiplications / total:.1f} %"
            shape = " x ".join(map(str, entry.shape))
            rows.append((name, shape, where, share))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) for text, width in zip(row, widths, strict=True)
            )
            for row in rows
        ]
        lines.append(
            f"{len(self.kernels)} kernels, {len(self.activations)} activations,"
            f" {len(self.batch_norms)} batch norms, {len(self.blocks)} blocks;"
            f" both operands quantized in {100 * self.quantized_share:.1f} % of"
            f" {total:,} multiplications"
        )
        return "\n".join(line.rstrip() for line in (*lines, *self.notes))
