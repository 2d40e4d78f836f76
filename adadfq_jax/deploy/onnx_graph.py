"""An ONNX graph under construction: nodes, constants and quantized tensors.

Kernels and activations are wrapped in QuantizeLinear / DequantizeLinear pairs (kernels,
being constant, in the second alone), kernels per output channel. Types are the
narrowest that hold the bits, and with them come the versions of ONNX that have them:

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

_TYPES = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
_OPSET_AND_IR = {2: (25, 13), 4: (21, 10), 8: (13, 8)}


# Until opset 17 these take their axes as an attribute, from 18 on as an input.
_AXES_MOVED = ("ReduceMax", "ReduceMin", "ReduceProd")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An edge of the graph.

    Attributes:
      name: of the edge.
      shape: as JAX has it, of the traced batch.
      order: of JAX's axes in the graph, whose axis i is axis order[i]; () where they
        are the same.
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
        """The graph's axes that are these of JAX."""
        return [self.order.index(axis) for axis in axes]

    def permuted(self, permutation: Sequence[int]) -> "Tensor":
        """JAX's transpose of the tensor, of which the graph knows nothing."""
        order = tuple(permutation.index(axis) for axis in self.order)
        shape = tuple(self.shape[axis] for axis in permutation)
        return Tensor(self.name, shape, order)

    def reshaped_order(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The order after a reshape under which all values stay where they are.

        Returns:
          None where values have to move: what becomes one axis lies apart.
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
    """Axes of two shapes that a reshape turns into one another, without those of 1."""
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
    """A kernel [out, ...]: its output channels in one axis, the others in an order.

    Args:
      kernel: codes, or an array.
      outer: its axes of the output channels.
      inner: its other axes.
      flat: whether these become one, too.
    """

    def moved(array: np.ndarray) -> np.ndarray:
        sizes = [array.shape[axis] for axis in inner]
        if flat:
            sizes = [math.prod(sizes)]
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


class Graph:
    """Nodes and constants in the order in which they were added.

    Args:
      uint8_only: whether codes of less than 8 bits take a byte each, for runtimes
        that do not know the narrow types.
    """

    def __init__(self, uint8_only: bool = False):
        self._narrowest = 8 if uint8_only else 2
        self._widths = {8}  # of the codes so far
        self._edges = {"images", "logits"}  # names that are no constant's
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, array: Any, name: str = "") -> str:
        """Adds an array, packed if its type is narrower than a byte; its name.

        A second array of a name gets a number: a kernel that is used twice is there
        twice where the batch norms behind it differ, and once where it is the same.
        """
        # A scalar becomes [1]: ONNX Runtime fuses a Clip to scalars with a quantizer,
        # and then refuses it if its codes are narrow.
        array = np.ascontiguousarray(array)
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
        """Adds a node with one output of the given shape and order, see `Tensor`."""
        name = f"{operator}_{len(self.nodes)}"
        while name in self.constants:  # a variable's
            name += "_"
        self._edges.add(name)
        made = helper.make_node(operator, inputs, [name], name, **attributes)
        self.nodes.append(made)
        return Tensor(name, shape, tuple(order))

    def output(self, x: Tensor, name: str) -> None:
        """Names an edge as an output of the graph."""
        self.nodes.append(helper.make_node("Identity", [x.name], [name], name))

    def kernel(self, name: str, kernel: Kernel) -> str:
        """Adds a kernel; the name of its real values.

        Args:
          name: of its codes.
          kernel: with one axis of output channels.
        """
        codes, dtype = kernel.codes, self._type(kernel.bits)
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
        """The type of codes of k bits."""
        width = max(self._narrowest, storage_bits(bits))
        self._widths.add(width)
        return _TYPES[width]

    def quantizer(
        self, x: Tensor, parameters: Range, *, whole_bytes: bool = False
    ) -> Tensor:
        """Adds the fake quantization of an activation.

        The runtime clips to the type; a Clip comes before where the bits do not fill
        it. An offset is taken off before and put on again after. `whole_bytes` gives
        a code a byte, however few its bits.
        """
        scale, zero_point, offset, bits = parameters
        # ONNX Runtime fuses quantizers into operators that refuse UINT2.
        dtype, top = self._type(8 if whole_bytes else max(4, bits)), 2**bits - 1

        def then(operator: str, *constants: Any) -> None:
            nonlocal x
            names = [x.name, *map(self.constant, constants)]
            x = self.node(operator, names, x.shape, x.order)

        if offset:
            then("Sub", offset)
        if top < ml_dtypes.iinfo(dtype).max:
            then("Clip", *(np.float32((end - zero_point) * scale) for end in (0, top)))
        then("QuantizeLinear", scale, np.asarray(zero_point, dtype))
        then("DequantizeLinear", scale, np.asarray(zero_point, dtype))
        if offset:
            then("Add", offset)
        return x

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: dict[str, str],
    ) -> onnx.ModelProto:
        """The finished model, checked by ONNX; metadata goes to its properties."""
        opset, ir_version = _OPSET_AND_IR[min(self._widths)]
        nodes = self.nodes if opset >= 18 else list(map(self._of_old, self.nodes))
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
        onnx.checker.check_model(model, full_check=True)
        return model

    def _of_old(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The node as it was before opset 18."""
        if node.op_type not in _AXES_MOVED:
            return node
        x, axes = node.input
        old = onnx.NodeProto()
        old.CopyFrom(node)
        old.input[:] = [x]
        values = numpy_helper.to_array(self.constants[axes]).tolist()
        old.attribute.append(helper.make_attribute("axes", values))
        return old
