"""An ONNX graph under construction: nodes, constants and quantized tensors.

An activation passes through a QuantizeLinear / DequantizeLinear pair. A kernel is
constant and needs DequantizeLinear alone, with a scale per output channel. Codes have
the narrowest type that holds their bits, which sets the version of ONNX:

    UINT8    opset 13, IR 8
    UINT4    opset 21, IR 10    two codes to a byte
    UINT2    opset 25, IR 13    four codes to a byte; kernels only
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from adadfq_jax.deploy.codes import Kernel, Range, storage_bits
from adadfq_jax.errors import ExportError, InputError, first_line
from adadfq_jax.network.trace import TRACED_BATCHES

_TYPES = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
_OPSET_AND_IR = {2: (25, 13), 4: (21, 10), 8: (13, 8)}


# These operators take their axes as an attribute up to opset 17, then as an input.
_AXES_MOVED = ("ReduceMax", "ReduceMin", "ReduceProd")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An edge of the graph.

    Attributes:
      name: of the edge.
      shape: as JAX has it, with the traced batch.
      order: axis i in the graph is JAX's axis order[i]; () where they are the same.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        order = tuple(map(int, self.order or range(len(self.shape))))
        object.__setattr__(self, "order", order)

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the graph."""
        return tuple(self.shape[axis] for axis in self.order)

    def axes(self, axes: Sequence[int]) -> list[int]:
        """Return the graph's axes for axes of JAX."""
        return [self.order.index(axis) for axis in axes]

    def permuted(self, permutation: Sequence[int]) -> "Tensor":
        """Transpose the tensor as JAX does, by its order alone, without a node."""
        order = tuple(permutation.index(axis) for axis in self.order)
        shape = tuple(self.shape[axis] for axis in permutation)
        return Tensor(self.name, shape, order)

    def reshaped_order(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the order after a reshape that leaves all values in their places.

        Returns:
          The order, or None where values have to move, because axes that become one
          axis do not lie side by side.
        """
        groups = _groups(self.shape, shape)
        left = [axis for axis in self.order if self.shape[axis] != 1]
        order: list[int] = []
        while left:
            before, after = next(group for group in groups if left[0] in group[0])
            if left[: len(before)] != before:
                return None
            left = left[len(before) :]
            order += after
        for axis, size in enumerate(shape):
            if size == 1:  # it may lie anywhere
                order.insert(order.index(axis - 1) + 1 if axis else 0, axis)
        return tuple(order)


def _groups(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Group axes that a reshape turns into one another, without axes of length 1."""
    old, new = (
        [axis for axis, size in enumerate(shape) if size != 1]
        for shape in (before, after)
    )
    groups = []
    while old:
        one, other = [old.pop(0)], [new.pop(0)]
        while missing := math.prod(after[axis] for axis in other) - math.prod(
            before[axis] for axis in one
        ):
            axes, left = (one, old) if missing > 0 else (other, new)
            axes.append(left.pop(0))
        groups.append((one, other))
    return groups


def features_first(
    kernel: Kernel | np.ndarray,
    outer: Sequence[int],
    inner: Sequence[int],
    *,
    flat: bool = False,
) -> Kernel | np.ndarray:
    """Move a kernel's output channels to the front, into one axis: HWIO -> OIHW.

    Args:
      kernel: codes, or an array.
      outer: the kernel's axes of output channels.
      inner: its other axes, in their order in the result.
      flat: whether the inner axes become one axis, too.
    """

    def moved(array: np.ndarray) -> np.ndarray:
        sizes = [array.shape[axis] for axis in inner]
        sizes = [math.prod(sizes)] if flat else sizes
        return array.transpose(*outer, *inner).reshape(-1, *sizes)

    if not isinstance(kernel, Kernel):
        return moved(kernel)
    axes = sorted(outer)
    sizes = [kernel.codes.shape[axis] for axis in axes]
    order = [axes.index(axis) for axis in outer]
    scale, zero_point = (
        values.reshape(sizes).transpose(order).reshape(-1)
        for values in (kernel.scale, kernel.zero_point)
    )
    return Kernel(moved(kernel.codes), scale, zero_point, kernel.bits, (0,))


def no_rule(what: str) -> InputError:
    """Make the error for a network that has `what`, an operation without a rule."""
    return InputError(f"the network has {what}, for which there is no ONNX rule")


def _integers(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, np.int64)


class Graph:
    """Nodes and constants in the order in which they were added.

    Args:
      least_bits: 2, 4 or 8, the narrowest type of codes, for runtimes that do not know
        the narrower ones.
      batch: number of images in the traced batch. An axis whose length is a multiple
        of it holds the images, and its length is open in the graph.
      scalar_bounds: whether the bounds of a Clip are scalars, see `clipped`.
    """

    def __init__(
        self,
        least_bits: int = 2,
        batch: int = TRACED_BATCHES[0],
        scalar_bounds: bool = False,
    ):
        self._batch, self._scalar_bounds = batch, scalar_bounds
        self._narrowest = least_bits
        self._widths = {8}  # bits of the code types used so far
        self._edges = {"images", "logits"}  # names that a constant must not have
        self._transposed: dict[tuple[Tensor, tuple[int, ...]], Tensor] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, array: Any, name: str = "") -> str:
        """Add an array, packed if its type is narrower than a byte; return its name.

        A different array of the same name gets a number. A kernel that is used twice is
        stored twice if the batch norms after it differ, and once if they are equal.
        """
        array = np.ascontiguousarray(array)  # a scalar becomes [1]
        wanted = name or f"constant_{len(self.constants)}"
        name, use = wanted, 1
        while True:
            made = numpy_helper.from_array(array, name)
            if (
                name not in self._edges
                and self.constants.setdefault(name, made) == made
            ):
                return name
            use += 1
            name = f"{wanted}.{use}"

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        shape: tuple[int, ...],
        order: Sequence[int] = (),
        **attributes: Any,
    ) -> Tensor:
        """Add a node with one output of the given shape and order, see `Tensor`."""
        name = f"{operator}_{len(self.nodes)}"
        while name in self.constants:  # a variable has this name
            name += "_"
        self._edges.add(name)
        made = helper.make_node(operator, inputs, [name], name, **attributes)
        self.nodes.append(made)
        return Tensor(name, shape, tuple(order))

    def apply(
        self,
        operator: str,
        x: Tensor,
        *constants: Any,
        shape: tuple[int, ...] | None = None,
        order: Sequence[int] | None = None,
        **attributes: Any,
    ) -> Tensor:
        """Add a node that reads one edge and constants.

        The result has the shape and the order of `x` where they are not given.
        """
        names = [x.name, *map(self.constant, constants)]
        shape = x.shape if shape is None else shape
        order = x.order if order is None else order
        return self.node(operator, names, shape, order, **attributes)

    def output(self, x: Tensor, name: str) -> None:
        """Make an edge an output of the graph under a name."""
        self.nodes.append(helper.make_node("Identity", [x.name], [name], name))

    # The batch.

    def is_batch(self, size: int) -> bool:
        """Tell whether an axis of this length holds the images."""
        return size % self._batch == 0

    def batch_axis(self, shape: Sequence[int]) -> int:
        """Return the axis that holds the images.

        Raises:
          InputError: no axis holds them, or several do.
        """
        axes = [axis for axis, size in enumerate(shape) if self.is_batch(size)]
        if len(axes) != 1:
            raise no_rule("a tensor without a batch")
        return axes[0]

    def compact(self, array: np.ndarray) -> np.ndarray:
        """Shorten an array that is to be broadcast.

        Axes along which all values are equal get length 1; one value becomes a scalar.

        Raises:
          InputError: the array differs from image to image of a batch.
        """
        for axis, size in enumerate(array.shape):
            first = array.take([0], axis)
            if size > 1 and (array == first).all():
                array = first
            elif self.is_batch(size):
                raise no_rule("a constant that differs from image to image")
        return array.reshape(()) if array.size == 1 else array

    def repeated(self, array: np.ndarray, like: Tensor) -> Tensor:
        """Add an array that is the same for each image, in the batch size of `like`."""
        at, other = self.batch_axis(array.shape), self.batch_axis(like.shape)
        if array.shape[at] != like.shape[other]:
            raise no_rule("a constant that differs from image to image")
        sizes = self.node("Shape", [like.name], (len(like.shape),))
        index = _integers(like.axes([other]))
        batch = self.apply("Gather", sizes, index, shape=(1,), order=())
        before, after = (
            self.constant(_integers(part))
            for part in (array.shape[:at], array.shape[at + 1 :])
        )
        whole = self.node("Concat", [before, batch.name, after], (array.ndim,), axis=0)
        small = self.constant(self.compact(array))
        return self.node("Expand", [small, whole.name], array.shape)

    # JAX's operations that move values.

    def transposed(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """Return the tensor in the given order, by a Transpose where it is needed."""
        order = tuple(order)
        if order == x.order:
            return x
        if (x, order) not in self._transposed:
            perm = x.axes(order)
            made = self.apply("Transpose", x, order=order, perm=perm)
            self._transposed[x, order] = made
        return self._transposed[x, order]

    def reshaped(
        self, x: Tensor, shape: tuple[int, ...], order: Sequence[int] | None = None
    ) -> Tensor:
        """Reshape as JAX does, in the given order if that needs no Transpose."""
        kept = x.reshaped_order(shape)
        if kept is None:
            x = self.transposed(x, range(len(x.shape)))
            kept = tuple(range(len(shape)))

        def long(axes: Sequence[int]) -> list[int]:
            return [axis for axis in axes if shape[axis] != 1]

        if order is not None and long(order) == long(kept):
            kept = tuple(order)
        stored = tuple(shape[axis] for axis in kept)
        if stored == x.stored:
            return Tensor(x.name, shape, kept)
        at, sizes = self.batch_axis(stored), list(stored)
        sizes[at] = 0 if x.stored[at : at + 1] == (stored[at],) else -1
        return self.apply("Reshape", x, _integers(sizes), shape=shape, order=kept)

    def sliced(
        self,
        x: Tensor,
        starts: Sequence[int],
        limits: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> Tensor:
        """Slice as JAX does."""
        rows = [
            (begin, end, axis, step)
            for axis, (begin, end, step) in enumerate(
                zip(starts, limits, strides or [1] * len(starts), strict=True)
            )
            if (begin, end, step) != (0, x.shape[axis], 1)
        ]
        if not rows:
            return x
        shape = list(x.shape)
        for begin, end, axis, step in rows:
            if self.is_batch(x.shape[axis]):
                raise no_rule("a part of the batch")
            shape[axis] = len(range(begin, end, step))
        begins, ends, axes, steps = zip(*rows, strict=True)
        columns = map(_integers, (begins, ends, x.axes(axes), steps))
        return self.apply("Slice", x, *columns, shape=tuple(shape))

    def reversed(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Reverse axes, as JAX's rev does."""
        if any(self.is_batch(x.shape[axis]) for axis in axes):
            raise no_rule("a batch in reverse")
        ends = ([-1] * len(axes), [-(2**31)] * len(axes))
        steps = [-1] * len(axes)
        return self.apply("Slice", x, *map(_integers, (*ends, x.axes(axes), steps)))

    def padded(
        self, x: Tensor, ends: Sequence[tuple[int, int]], value: np.ndarray
    ) -> Tensor:
        """Pad the ends as JAX does; see `dilated` for values in between."""
        sizes = list(zip(x.shape, ends, strict=True))
        if any(self.is_batch(size) and any(pair) for size, pair in sizes):
            raise no_rule("a padding of the batch")
        if min(map(min, ends)) < 0:
            raise no_rule("a negative padding")
        shape = tuple(size + sum(pair) for size, pair in sizes)
        pads = _integers([ends[axis][end] for end in (0, 1) for axis in x.order])
        return self.apply("Pad", x, pads, value, shape=shape)

    def dilated(self, x: Tensor, gaps: Sequence[int], value: np.ndarray) -> Tensor:
        """Insert `gaps[axis]` copies of a value between neighbours along each axis."""
        for axis, gap in enumerate(gaps):
            if gap:
                before, (size, *after) = x.shape[:axis], x.shape[axis:]
                x = self.reshaped(x, (*before, size, 1, *after))
                ends = [(0, 0)] * len(x.shape)
                ends[axis + 1] = (0, gap)
                x = self.padded(x, ends, value)
                x = self.reshaped(x, (*before, size * (gap + 1), *after))
                limits = [*before, size * (gap + 1) - gap, *after]
                x = self.sliced(x, [0] * len(limits), limits)
        return x

    def undo_relu(self, x: Tensor) -> Tensor | None:
        """Remove the last node if it is the Relu that computes x; return its input."""
        last = self.nodes[-1] if self.nodes else None
        if last is None or last.op_type != "Relu" or last.output[0] != x.name:
            return None
        self.nodes.pop()
        return dataclasses.replace(x, name=last.input[0])

    def clipped(self, x: Tensor, low: Any, high: Any) -> Tensor:
        """Add a Clip to two numbers, or to one where the other is None.

        ONNX wants scalars as bounds, and ONNX Runtime then fuses the Clip with a
        convolution before it. It also fuses it with a quantizer after it, but refuses
        that operator if its codes are narrow. Bounds of shape [1] prevent both.
        """
        names = [
            "" if bound is None else self._bound(np.float32(bound))
            for bound in (low, high)
        ]
        return self.node("Clip", [x.name, *names], x.shape, x.order)

    def _bound(self, bound: np.ndarray | np.float32) -> str:
        if not self._scalar_bounds:
            return self.constant(bound)
        name = f"bound_{float(bound)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(bound), name)
        return name

    # Quantized tensors.

    def kernel(self, name: str, kernel: Kernel, least_bits: int = 2) -> str:
        """Add a kernel; return the name of its real values.

        Args:
          name: of its codes.
          kernel: has one axis of output channels.
          least_bits: the narrowest type allowed for its codes, in bits.
        """
        codes, dtype = kernel.codes, self._type(max(least_bits, kernel.bits))
        (axis,) = kernel.out_axes
        inputs = [
            self.constant(codes.astype(dtype), name),
            self.constant(kernel.scale, f"{name}.scale"),
            self.constant(kernel.stored_zero_point.astype(dtype), f"{name}.zero_point"),
        ]
        axis %= codes.ndim
        real = self.node("DequantizeLinear", inputs, codes.shape, axis=axis)
        if kernel.offset.any():
            offset = kernel.per_channel(kernel.offset)
            offset_name = self.constant(offset, f"{name}.offset")
            real = self.node("Add", [real.name, offset_name], codes.shape)
        return real.name

    def _type(self, bits: int) -> Any:
        """Return the type for codes of k bits, and note its width."""
        width = max(self._narrowest, storage_bits(bits))
        self._widths.add(width)
        return _TYPES[width]

    def quantizer(
        self, x: Tensor, parameters: Range, *, whole_bytes: bool = False
    ) -> Tensor:
        """Add the fake quantization of an activation.

        The runtime clips to the range of the type. Where the bits do not fill the type,
        a Clip comes first. An offset is subtracted before and added again afterwards.

        Args:
          x: the activation.
          parameters: its range.
          whole_bytes: whether each code takes a byte, however few its bits.
        """
        scale, zero_point, offset, bits = parameters
        # ONNX Runtime fuses quantizers into operators that refuse UINT2.
        dtype, top = self._type(8 if whole_bytes else max(4, bits)), 2**bits - 1

        pair = scale, np.asarray(zero_point, dtype)
        if offset:
            x = self.apply("Sub", x, offset)
        if top < ml_dtypes.iinfo(dtype).max:
            ends = [np.float32((end - zero_point) * scale) for end in (0, top)]
            x = self.clipped(x, *ends)
        x = self.apply("QuantizeLinear", x, *pair)
        x = self.apply("DequantizeLinear", x, *pair)
        return self.apply("Add", x, offset) if offset else x

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: dict[str, str],
    ) -> onnx.ModelProto:
        """Build the model and let ONNX check it; metadata goes to its properties.

        Raises:
          ExportError: ONNX finds the model invalid.
        """
        opset, ir_version = _OPSET_AND_IR[min(self._widths)]
        nodes = (
            self.nodes if opset >= 18 else list(map(self._before_opset_18, self.nodes))
        )
        read = {name for node in nodes for name in node.input}
        constants = [made for name, made in self.constants.items() if name in read]
        graph = helper.make_graph(nodes, "adadfq_jax", inputs, outputs, constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=ir_version,
            producer_name="adadfq_jax",
        )
        helper.set_model_props(model, metadata)
        try:
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # its errors have no class in common
            raise ExportError(
                f"the network gives an invalid ONNX model ({first_line(error)})"
            ) from error
        return model

    def _before_opset_18(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Return the node as it was before opset 18."""
        if node.op_type not in _AXES_MOVED or len(node.input) == 1:
            return node
        x, axes = node.input
        old = onnx.NodeProto()
        old.CopyFrom(node)
        old.input[:] = [x]
        values = numpy_helper.to_array(self.constants[axes]).tolist()
        old.attribute.append(helper.make_attribute("axes", values))
        return old


class IntegerGraph(Graph):
    """A graph in float32 that remembers what Q quantizes, for an integer file.

    Args:
      batch: see `Graph`.

    Attributes:
      kernels: quantized kernels, by the name of their constant; no array is stored.
      ranges: the two ends of the activations that Q quantizes, by edge.
    """

    def __init__(self, batch: int = TRACED_BATCHES[0]) -> None:
        super().__init__(batch=batch, scalar_bounds=True)
        self.kernels: dict[str, Kernel] = {}
        self.ranges: dict[str, tuple[float, float]] = {}

    def kernel(self, name: str, kernel: Kernel, least_bits: int = 2) -> str:
        """Remember a kernel; return the name of its real values."""
        found = self.constant(kernel.dequantize(), name)
        self.kernels[found] = kernel
        return found
