"""The parts of a traced network: kernels, activations, batch norms and blocks."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

from adadfq_jax.network.program import Operand, Program


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operand of a convolution or product that is computed from variables.

    Attributes:
      name: the variable's path, joined by dots; '#2', '#3' and so on are added for
        the second and later operations that read the variable.
      shape: the shape that the operation sees.
      operation: 'convolution' or 'product'.
      out_axes: axes of the output channels; each channel has a range of its own.
      activation: the quantized activation that is the other operand, or ''.
      reason: why the other operand is not quantized, '' where it is.
      multiplications: number of multiplications for one image.
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
        """The name of the variable, which several operations may read."""
        return self.name.partition("#")[0]


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or product that stays in float because it has no kernel.

    Attributes:
      operation: 'convolution' or 'product'.
      shape: the shape of its second operand, without the batch.
      reason: why it is not quantized.
      multiplications: number of multiplications for one image.
    """

    operation: str
    shape: tuple[int, ...]
    reason: str
    multiplications: int


@dataclasses.dataclass(frozen=True)
class Activation:
    """A tensor that Q quantizes once for all operations that read it.

    Attributes:
      name: '<first kernel that reads it>:input'.
      shape: its shape without the batch.
      readers: names of the kernels that read it.
    """

    name: str
    shape: tuple[int, ...]
    readers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A batch norm in inference: (x - mean) / sqrt(var + epsilon).

    Attributes:
      name: the path of the variable that is its mean, without the last part.
      shape: the shape of its input, without the batch.
      axis: the axis of the channels in its input, counted with the batch axis.
      variables: names of its mean and variance, '' for one that is not a variable
        itself but is computed.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    variables: tuple[str, ...] = ("", "")


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of the network that is joined to the next piece by a single tensor.

    Attributes:
      name: the name of its first kernel.
      kernels: names of its kernels, in order.
      activations: names of the activations that are computed in it.
      shape: the shape of its output, without the batch.
    """

    name: str
    kernels: tuple[str, ...]
    activations: tuple[str, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Places:
    """The positions of a graph's entries in the program for one batch size.

    Attributes:
      program: the flattened network.
      kernels: the index of a kernel, by (equation, operand).
      activations: the index of an activation, by value.
      batch_norms: the input, mean and variance of each batch norm.
      cuts: the last value of each block.
    """

    program: Program
    kernels: dict[tuple[int, int], int]
    activations: dict[Any, int]
    batch_norms: tuple[tuple[Any, Any, Any], ...]
    cuts: tuple[Any, ...]

    @functools.cached_property
    def producers(self) -> dict[Any, int]:
        """The index of the equation that computes each value."""
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
        """Find the equations that compute the wanted values.

        Args:
          wanted: the values.
          known: values that need not be computed.
          replaced: operands that are not read, as (equation, operand).

        Returns:
          The indices of the equations, in order.
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

    All entries are in the order of the network.

    Attributes:
      kernels: the kernels.
      products: the convolutions and products without a kernel.
      activations: the activations that Q quantizes.
      batch_norms: the batch norms.
      blocks: the blocks; together they are the network.
      image_shape: (H, W, channels).
      layout: layout of the images that the network takes, 'NHWC' or 'NCHW'.
      rule: where activations are quantized, 'nonlinearities' or 'all', see `trace`.
      num_classes: length of the logits.
      variables: names of the variables, in the order of the network's tree.
      needed: names of the variables that the logits are computed from.
      parameters: names of the variables that can be trained.
      beside_kernels: names of the variables that are needed where all kernels are
        given.
      dtype: dtype of the images.
      traced_batch: number of images in the batch that was traced.
      notes: remarks for the user, for example that a final softmax was cut off.
      make_places: batch size -> `Places`.
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
        """The multiplications of all convolutions and products, for one image."""
        entries: tuple[Kernel | Product, ...] = (*self.kernels, *self.products)
        return sum(entry.multiplications for entry in entries)

    @functools.cached_property
    def quantized_share(self) -> float:
        """The share of the multiplications whose operands are both quantized."""
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
