"""Q as an ONNX model that runtimes compute in integers.

The model has QuantizeLinear and DequantizeLinear between all operators, so that ONNX
Runtime and others replace each operator by one on 8-bit integers. A byte is the least
that they compute with: Q's narrower codes become bytes, too.

- A kernel is INT8 per output channel, in [-127, 127], with zero point 0. Up to 7 bits
  these are Q's codes minus their zero point. A channel where they do not fit is rounded
  again, with the scale max|w| / 127.
- An activation that Q quantizes has 256 levels on Q's range, whatever Q's bits.
- A tensor that Q leaves in float gets the range of its values on some images.
- A bias is INT32, in units of (input's scale) * (kernel's scale). Where it would not
  fit, the channel's scale is raised.
- Relu and Clip become ends of the range of the tensor that they compute.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from adadfq_jax.deploy.codes import Kernel, quantize_range
from adadfq_jax.deploy.onnx_graph import Graph, IntegerGraph, Tensor

_MOST_CODE = 127
_MOST_BIAS = 2**30  # the sum of products is added to it in 32 bits
# Operators that ONNX Runtime computes on integers.
_INTEGER = frozenset({
    "Add", "AveragePool", "Concat", "Conv", "Gemm", "GlobalAveragePool", "LeakyRelu",
    "MatMul", "Mul", "Sigmoid",
})  # fmt: skip
_WITHOUT_CONSTANT = frozenset({"Add", "Mul"})  # only if both operands are activations
# Operators that give values of their input, on its range.
_MOVING = frozenset({
    "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Tile",
    "Transpose",
})  # fmt: skip


class Scale(NamedTuple):
    """The scale and the zero point of a tensor of bytes."""

    scale: np.float32
    zero_point: np.uint8 | np.int8


class IntegerKernel(NamedTuple):
    """A kernel [out, ...] for an integer file: codes * scale, per output channel.

    Attributes:
      codes: int8, in [-127, 127].
      scale: float32 [out].
      rounded_again: bool [out], the channels whose codes are not Q's.
    """

    codes: np.ndarray
    scale: np.ndarray
    rounded_again: np.ndarray


def integer_kernel(
    kernel: Kernel, least_scale: np.ndarray | float = 0.0
) -> IntegerKernel:
    """Return the INT8 codes of a kernel with zero point 0.

    Args:
      kernel: has its output channels on the first axis.
      least_scale: [out]; a channel of a smaller scale is rounded again on this one.
    """
    by_channel = (-1, *[1] * (kernel.codes.ndim - 1))
    steps = kernel.codes - kernel.zero_point.astype(np.float64).reshape(by_channel)
    inner = tuple(range(1, steps.ndim))
    fits = np.abs(steps).max(inner, initial=0) <= _MOST_CODE
    again = ~fits | (kernel.scale < least_scale)
    real = kernel.dequantize()
    fitted = np.abs(real).max(inner, initial=0) / np.float32(_MOST_CODE)
    scale = np.where(fits, kernel.scale, fitted)
    scale = np.maximum(scale, least_scale).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))
    rounded = np.rint(real / scale.reshape(by_channel))
    codes = np.where(again.reshape(by_channel), rounded, steps)
    return IntegerKernel(codes.astype(np.int8), scale, again)


def tensor_scale(low: float, high: float, *, symmetric: bool = False) -> Scale:
    """Return the scale of a tensor whose values lie in [low, high].

    Args:
      low: the range is widened so that it holds 0.
      high: likewise.
      symmetric: whether the codes are INT8 with zero point 0 instead of UINT8.
    """
    if symmetric:
        most = max(abs(low), abs(high), 1e-8)
        return Scale(np.float32(most / _MOST_CODE), np.int8(0))
    found = quantize_range(min(low, 0.0), max(high, 0.0), 8)
    return Scale(found.scale, np.uint8(found.zero_point))


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices for making an integer file. Its images are those of `OnnxOptions`.

    Attributes:
      symmetric: whether activations are INT8 with zero point 0, too. Relu and Clip then
        stay.
      float_biases: whether biases stay in float32.
      float_layers: names of kernels whose convolution or product stays in float32.
    """

    symmetric: bool = False
    float_biases: bool = False
    float_layers: Collection[str] = ()


class IntegerNetwork:
    """The nodes of an integer file, and the ranges of its tensors.

    Attributes:
      ranges: the two ends of the tensors whose ranges are known, by edge.
      rounded_again: number of the kernels' channels whose codes are not Q's.

    Args:
      graph: the network in float32, with what Q quantizes.
      image: the edge of the normalised images.
      output: the edge of the logits.
      choices: see `Choices`.
    """

    def __init__(
        self, graph: IntegerGraph, image: str, output: str, choices: Choices
    ) -> None:
        self._graph, self._output, self._choices = graph, output, choices
        self._nodes = list(map(_copy, graph.nodes))
        self._kernels = dict(graph.kernels)
        self._bounds: dict[str, tuple[float, float]] = {}  # of a Relu or a Clip
        self.rounded_again = 0
        self._last_convolution_as_product()
        if not choices.symmetric:
            self._fold()
        self._roots = self._integer_edges(image)
        self.ranges: dict[str, tuple[float, float]] = {}
        for edge, root in self._roots.items():
            if edge in graph.ranges:
                self.set_range(root, *graph.ranges[edge])

    @property
    def open(self) -> list[str]:
        """The edges whose ranges are not known."""
        return sorted(set(self._roots.values()) - set(self.ranges))

    def set_range(self, edge: str, low: float, high: float) -> None:
        """Set the range of a tensor, within the bounds of its Relu or Clip."""
        least, most = self._bounds.get(edge, (-np.inf, np.inf))
        self.ranges[edge] = (
            float(np.clip(low, least, most)),
            float(np.clip(high, least, most)),
        )

    # Which edges hold integers.

    def _activations(self, node: onnx.NodeProto) -> list[str]:
        return [x for x in node.input if x and x not in self._graph.constants]

    def _is_integer(self, node: onnx.NodeProto) -> bool:
        if any(x in self._choices.float_layers for x in node.input):
            return False
        if node.op_type in _WITHOUT_CONSTANT:
            return len(self._activations(node)) == 2
        return node.op_type in _INTEGER

    def _constant(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._graph.constants[name])

    def _last_convolution_as_product(self) -> None:
        """Turn a last convolution of single places into a Gemm, whose output is float.

        The output of an integer convolution would be bytes, too coarse for logits.
        """
        made = {node.output[0]: node for node in self._nodes}
        reshape = made.get(self._output)
        conv = made.get(reshape.input[0]) if reshape is not None else None
        if (
            reshape is None
            or conv is None
            or (reshape.op_type, conv.op_type) != ("Reshape", "Conv")
            or conv.input[1] not in self._kernels
        ):
            return
        kernel = self._kernels[conv.input[1]]
        shape = kernel.codes.shape
        ways = {x.name: helper.get_attribute_value(x) for x in conv.attribute}
        is_product = (
            {*shape[2:], *ways["strides"], ways["group"]} == {1}
            and not any(ways["pads"])
            and self._constant(reshape.input[1]).tolist()[1:] == [shape[0]]
        )
        if not is_product:
            return
        self._kernels[conv.input[1]] = dataclasses.replace(
            kernel, codes=kernel.codes.reshape(shape[:2])
        )
        x, flat = conv.input[0], f"{conv.name}_flat"
        reshape.CopyFrom(helper.make_node("Flatten", [x], [flat], flat))
        inputs, out = [flat, *conv.input[1:]], self._output
        conv.CopyFrom(helper.make_node("Gemm", inputs, [out], out, transB=1))
        at = self._nodes.index(conv), self._nodes.index(reshape)
        self._nodes[at[0]], self._nodes[at[1]] = reshape, conv

    def _fold(self) -> None:
        """Remove each Relu and Clip that the range of its input can replace."""
        readers = collections.Counter(x for node in self._nodes for x in node.input)
        made: dict[str, onnx.NodeProto] = {}  # integer nodes by output
        kept = []
        for node in self._nodes:
            x, y = node.input[0], node.output[0]
            if node.op_type in ("Relu", "Clip") and x in made:
                low, high = self._ends(node)
                if readers[x] == 1 and low <= 0 <= high and x not in self._graph.ranges:
                    old = self._bounds.pop(x, (-np.inf, np.inf))
                    self._bounds[y] = max(low, old[0]), min(high, old[1])
                    made[y] = made.pop(x)
                    made[y].output[0] = y
                    continue
            if self._is_integer(node):
                made[y] = node
            kept.append(node)
        self._nodes = kept

    def _ends(self, node: onnx.NodeProto) -> tuple[float, float]:
        """Return the two ends of a Relu or a Clip."""
        if node.op_type == "Relu":
            return 0.0, np.inf
        low, high = [*node.input[1:], "", ""][:2]
        return (
            float(self._constant(low)) if low else -np.inf,
            float(self._constant(high)) if high else np.inf,
        )

    def _integer_edges(self, image: str) -> dict[str, str]:
        """Return the edges of integers, each with the edge whose range it has."""
        roots = {image: image}
        readers = collections.defaultdict(list)
        for node in self._nodes:
            for name in node.input:
                readers[name].append(node.op_type)
        for node in self._nodes:
            if self._is_integer(node):
                # What a Relu alone reads is quantized after it.
                outputs = [
                    name
                    for name in node.output
                    if readers[name] not in (["Relu"], ["Clip"])
                ]
                for name in (*self._activations(node), *outputs):
                    roots.setdefault(name, name)
            elif node.op_type in _MOVING and node.input[0] in roots:
                roots[node.output[0]] = roots[node.input[0]]
        made = {node.output[0]: node for node in self._nodes}
        at = self._output
        last = [at]
        while at in made and made[at].op_type in _MOVING:
            at = made[at].input[0]
            last.append(at)
        if at not in made or made[at].op_type != "Conv":  # else it would stay in float
            for edge in last:
                roots.pop(edge, None)
        return roots

    # The model.

    def graph(self, *, measured: Collection[str] = ()) -> Graph:
        """Make the graph; tensors without a range stay in float.

        Args:
          measured: edges whose smallest and largest values become outputs, 'low:' and
            'high:' before the edge's name.
        """
        made = Graph(scalar_bounds=True)
        made.constants = dict(self._graph.constants)
        scales = {
            edge: tensor_scale(*self.ranges[root], symmetric=self._choices.symmetric)
            for edge, root in self._roots.items()
            if root in self.ranges
        }
        emitter = _Emitter(made, self._kernels, scales, self._choices)
        for edge in scales:
            if all(edge not in node.output for node in self._nodes):
                emitter.quantize(edge)
        for node in self._nodes:
            emitter.add(node, is_integer=self._is_integer(node))
        self.rounded_again = emitter.rounded_again
        for edge in measured:
            for end, operator in (("low", "ReduceMin"), ("high", "ReduceMax")):
                made.nodes.append(
                    helper.make_node(operator, [edge], [f"{end}:{edge}"], keepdims=0)
                )
        logits = emitter.names.get(self._output, self._output)
        made.output(Tensor(logits, ()), "logits")
        return made


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    return made


class _Emitter:
    """Adds nodes to a graph, with quantizers between them.

    Attributes:
      names: the edges of the dequantized values, by the edge of the float values.
      rounded_again: see `IntegerNetwork`.
    """

    def __init__(
        self,
        graph: Graph,
        kernels: Mapping[str, Kernel],
        scales: Mapping[str, Scale],
        choices: Choices,
    ) -> None:
        self._graph, self._kernels = graph, kernels
        self._scales, self._choices = scales, choices
        self.names: dict[str, str] = {}
        self.rounded_again = 0
        self._uses: collections.Counter[str] = collections.Counter()

    def add(self, node: onnx.NodeProto, *, is_integer: bool) -> None:
        """Add a node, which reads dequantized values."""
        inputs, made = list(node.input), _copy(node)
        made.input[:] = [self.names.get(name, name) for name in inputs]
        kernels = [at for at, name in enumerate(inputs) if name in self._kernels]
        for at in kernels if is_integer else ():
            bias = inputs[at + 1] if at + 1 < len(inputs) else ""
            x = self._scales.get(inputs[1 - at]) if at < 2 else None
            names = self._kernel(inputs[at], bias, x)
            made.input[at] = names[0]
            if bias:
                made.input[at + 1] = names[1]
        self._graph.nodes.append(made)
        edge = node.output[0]
        if any(name in self._choices.float_layers for name in inputs):
            # Between two quantizers ONNX Runtime would quantize a float kernel itself.
            # It does not remove this Max.
            made.output[0] = f"{edge}.float"
            least = self._graph.constant(np.finfo(np.float32).min, "least")
            self._graph.nodes.append(
                helper.make_node("Max", [made.output[0], least], [edge], f"{edge}.max")
            )
        if edge in self._scales:
            self.quantize(edge)

    def quantize(self, edge: str) -> None:
        """Add the quantizer of an edge."""
        scale, zero_point = self._scales[edge]
        pair = [
            self._scalar(f"{edge}.scale", scale),
            self._scalar(f"{edge}.zero_point", zero_point),
        ]
        codes, self.names[edge] = f"{edge}.codes", f"{edge}.real"
        for operator, x, y in (
            ("QuantizeLinear", edge, codes),
            ("DequantizeLinear", codes, self.names[edge]),
        ):
            self._graph.nodes.append(helper.make_node(operator, [x, *pair], [y], y))

    def _scalar(self, name: str, value: Any) -> str:
        array = np.asarray(value)
        self._graph.constants[name] = numpy_helper.from_array(array, name)
        return name

    def _kernel(self, name: str, bias: str, x: Scale | None) -> tuple[str, str]:
        """Add a kernel and its bias; return the names of their real values."""
        kernel = self._kernels[name]
        values = None
        least: np.ndarray | float = 0.0
        if bias and x is not None and not self._choices.float_biases:
            values = numpy_helper.to_array(self._graph.constants[bias])
            least = np.abs(values) / (np.float64(x.scale) * _MOST_BIAS)
        found = integer_kernel(kernel, least)
        self.rounded_again += int(found.rounded_again.sum())
        zeros = np.zeros(found.scale.shape, np.int8)
        real = self._dequantize(name, found.codes, found.scale, zeros)
        if values is None or x is None:
            return real, bias
        scale = (x.scale * found.scale).astype(np.float32)
        codes = np.rint(values.astype(np.float64) / scale).astype(np.int32)
        zeros = np.zeros(scale.shape, np.int32)
        return real, self._dequantize(f"{name}.bias", codes, scale, zeros)

    def _dequantize(
        self, name: str, codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray
    ) -> str:
        # ONNX Runtime cannot convert a constant that two operators share.
        self._uses[name] += 1
        if self._uses[name] > 1:
            name = f"{name}.{self._uses[name]}"
        known = self._graph.constants.get(name)
        if known is not None and known.data_type == onnx.TensorProto.FLOAT:
            del self._graph.constants[name]  # the same kernel in float32
        inputs = [
            self._graph.constant(codes, name),
            self._graph.constant(scale, f"{name}.scale"),
            self._graph.constant(zeros, f"{name}.zero_point"),
        ]
        return self._graph.node("DequantizeLinear", inputs, codes.shape, axis=0).name
