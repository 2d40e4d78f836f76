"""Translation of a jaxpr into an ONNX graph: a rule for each primitive of a classifier.

What depends on constants alone is computed here. Factors and terms per channel are
carried along (`Linear`) until they meet a nonlinearity: those of batch norms end in the
scales of the kernel before them and in the convolution's bias, at no cost. Images are
NHWC in Flax and NCHW in ONNX; every value of rank 4 is taken for one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from jax.extend import core

from adadfq_jax.deploy.codes import Kernel, Range, quantize_range
from adadfq_jax.deploy.onnx_graph import (
    AXIS,
    Graph,
    Tensor,
    channels_first,
    features_first,
)
from adadfq_jax.deploy.tracing import QUANTIZER
from adadfq_jax.errors import InputError


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
    parameters: Range
    whole_bytes: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Flax's."""
        return self.x.shape


class Translator:
    """Evaluates a jaxpr on values that are constants, kernels or edges of a graph.

    Args:
      graph: gets the nodes.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self._emitted: dict[int, tuple[Linear | Quantized, Tensor]] = {}

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]
    ) -> list[Any]:
        """The values of the jaxpr's results.

        Raises:
          InputError: a primitive has no rule.
        """
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return np.asarray(atom.val, aval.dtype)
            return values[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            outputs = self._equation(equation, inputs)
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Any]) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name == "jit" and params["name"] == QUANTIZER:
            return [self._quantize(*inputs)]
        if name == "platform_index":  # the form that is not of one platform
            return [np.asarray(params["platforms"].index(None))]
        if name == "cond" and isinstance(inputs[0], np.ndarray):
            inner = params["branches"][int(inputs[0])]
            return self.run(inner.jaxpr, inner.consts, inputs[1:])
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if isinstance(inner, core.ClosedJaxpr):
            return self.run(inner.jaxpr, inner.consts, inputs)
        if all(isinstance(value, np.ndarray) for value in inputs):
            found = equation.primitive.bind(*inputs, **params)
            found = found if equation.primitive.multiple_results else [found]
            return [np.asarray(value) for value in found]
        if name not in _RULES:
            raise InputError(
                f"the network has {name!r}, for which there is no ONNX rule"
            )
        if name != "reduce_window_max":
            inputs = [self.tensor(x) if isinstance(x, Quantized) else x for x in inputs]
        shape = equation.outvars[0].aval.shape
        return [_RULES[name](self, shape, *inputs, **params)]

    def operand(self, value: Any, shape: tuple[int, ...]) -> str:
        """The name of an operand of an elementwise node that gives the shape.

        Raises:
          InputError: a constant that differs from image to image of a batch.
        """
        if isinstance(value, np.ndarray) and value.ndim == len(shape) > 1:
            if (value != value[:1]).any():
                raise InputError("the network has a constant per image: no ONNX rule")
            value = value[:1]  # the batch is open
        return self.tensor(value).name

    def tensor(self, value: Any) -> Tensor:
        """The value as an edge of the graph, added when it is first asked for."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, np.ndarray):
            name = self.graph.constant(channels_first(value))
            return Tensor(name, value.shape)
        if not isinstance(value, Linear | Quantized):
            raise InputError("a kernel is used by other than a convolution or product")
        if id(value) not in self._emitted:
            self._emitted[id(value)] = value, self._emit(value)
        return self._emitted[id(value)][1]

    def _emit(self, value: Linear | Quantized) -> Tensor:
        if isinstance(value, Quantized):
            return self.graph.quantizer(
                value.x, value.parameters, whole_bytes=value.whole_bytes
            )
        source, factor, term = value.source, value.factor, value.term
        if isinstance(source, Product):
            inputs = [source.x, self._kernel(source.kernel, factor)]
            if not isinstance(source.kernel.kernel, Kernel):
                bias = np.broadcast_to(term, source.shape[-1:])
                inputs.append(self.graph.constant(bias))
                term = np.zeros_like(term)
            # The bias of a quantized kernel is not given to the node: ONNX Runtime
            # would round it to whole steps of the integer sum, which are coarse at few
            # bits. It is an Add of its own.
            source = self.graph.node(
                source.operator, inputs, source.shape, **source.attributes
            )
            factor = np.ones_like(factor)
        for operator, operand, neutral in (("Mul", factor, 1), ("Add", term, 0)):
            if (operand != neutral).any():
                if operand.ndim and len(source.shape) == 4:
                    operand = operand.reshape(-1, 1, 1)
                names = [source.name, self.graph.constant(operand)]
                source = self.graph.node(operator, names, source.shape)
        return source

    def _kernel(self, named: NamedKernel, factor: np.ndarray) -> str:
        kernel = named.kernel
        if isinstance(kernel, Kernel):
            return self.graph.kernel(named.name, kernel.scaled(factor))
        return self.graph.constant(features_first(kernel * factor), named.name)

    def _quantize(self, x: Any, lo: Any, hi: Any, bits: Any) -> Quantized:
        parameters = quantize_range(float(lo), float(hi), int(bits))
        return Quantized(self.tensor(x), parameters)


def _linear(value: Tensor | Linear) -> Linear:
    if isinstance(value, Linear):
        return value
    return Linear(value, np.ones((), np.float32), np.zeros((), np.float32))


def _per_channel(operand: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """A constant as a scalar or a vector over channels, None if it is neither."""
    if not isinstance(operand, np.ndarray):
        return None
    if operand.size == 1:
        return operand.reshape(())
    return (
        operand.reshape(-1) if operand.size == operand.shape[-1] == shape[-1] else None
    )


def _elementwise(operator: str) -> Callable[..., Any]:
    """Add, Sub, Mul or Div; with a constant per channel it joins a `Linear`."""

    def rule(translator, shape, a, b, **_):
        if operator in ("Add", "Mul") and isinstance(a, np.ndarray):
            a, b = b, a
        constant = _per_channel(b, shape)
        if constant is None or not isinstance(a, Linear | Tensor) or a.shape != shape:
            names = [translator.operand(value, shape) for value in (a, b)]
            return translator.graph.node(operator, names, shape)
        old = _linear(a)
        if operator in ("Add", "Sub"):
            sign = 1 if operator == "Add" else -1
            return dataclasses.replace(old, term=old.term + sign * constant)
        by = constant if operator == "Mul" else np.float32(1) / constant
        return Linear(old.source, old.factor * by, old.term * by)

    return rule


def _max(translator, shape, a, b, **_):
    if isinstance(a, np.ndarray):
        a, b = b, a
    if isinstance(b, np.ndarray) and not b.any():
        return translator.graph.node("Relu", [translator.tensor(a).name], shape)
    names = [translator.operand(value, shape) for value in (a, b)]
    return translator.graph.node("Max", names, shape)


def _min(translator, shape, a, b, **_):
    names = [translator.operand(value, shape) for value in (a, b)]
    return translator.graph.node("Min", names, shape)


def _convolution(translator, shape, x, kernel, **params):
    numbers = params["dimension_numbers"]
    plain = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (
        (0, 3, 1, 2),
        (3, 2, 0, 1),
        (0, 3, 1, 2),
    )
    if (
        not plain
        or params["batch_group_count"] != 1
        or set(params["lhs_dilation"]) != {1}
    ):
        raise InputError(
            "the network has a convolution for which there is no ONNX rule"
        )
    attributes = {
        "strides": params["window_strides"],
        "pads": [
            int(before_after[end])
            for end in (0, 1)
            for before_after in params["padding"]
        ],
        "dilations": params["rhs_dilation"],
        "group": params["feature_group_count"],
    }
    return _product(translator, "Conv", x, kernel, shape, attributes)


def _dot(translator, shape, x, kernel, **params):
    if params["dimension_numbers"] != (((1,), (0,)), ((), ())):
        raise InputError("the network has a product for which there is no ONNX rule")
    # The kernel as [out, in]: of [in, out] ONNX Runtime makes a product of its own,
    # with activations rounded to 8 bits.
    return _product(translator, "Gemm", x, kernel, shape, {"transB": 1})


def _product(translator, operator, x, kernel, shape, attributes):
    if isinstance(kernel, np.ndarray):
        kernel = NamedKernel(f"kernel_{len(translator.graph.constants)}", kernel)
    if not isinstance(kernel, NamedKernel):
        raise InputError("the network has a product of two activations: no ONNX rule")
    product = Product(operator, translator.tensor(x).name, kernel, shape, attributes)
    return _linear(product)


def _reduce_sum(translator, shape, x, *, axes, **_):
    x = translator.tensor(x)
    if len(x.shape) == 4:
        axes = [AXIS[axis] for axis in axes]
        if len(shape) == 3:
            raise InputError("the network has a sum for which there is no ONNX rule")
    inputs = [x.name, translator.graph.constant(np.asarray(axes, np.int64))]
    return translator.graph.node("ReduceSum", inputs, shape, keepdims=0)


def _in_graph_order(values: Sequence[Any]) -> list[int]:
    """One value for each axis, in the order that the axes have in the graph."""
    order = (0, 3, 1, 2) if len(values) == 4 else range(len(values))
    return [int(values[axis]) for axis in order]


def _pad(translator, shape, x, value, *, padding_config):
    before, after, inside = (
        list(column) for column in zip(*padding_config, strict=True)
    )
    if any(inside) or min(before + after) < 0:
        raise InputError("the network has a padding for which there is no ONNX rule")
    pads = np.asarray(_in_graph_order(before) + _in_graph_order(after), np.int64)
    names = [translator.graph.constant(array) for array in (pads, np.float32(value))]
    return translator.graph.node("Pad", [translator.tensor(x).name, *names], shape)


def _slice(translator, shape, x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * len(shape)
    columns = [start_indices, limit_indices, range(len(shape)), strides]
    if start_indices[0] or limit_indices[0] != x.shape[0] or strides[0] != 1:
        raise InputError("the network takes a part of the batch: no ONNX rule")
    # Without the batch, whose size is open.
    columns = [column[1:] for column in columns]
    if len(shape) == 4:
        columns[2] = [AXIS[axis] for axis in columns[2]]
    names = [translator.graph.constant(np.asarray(c, np.int64)) for c in columns]
    return translator.graph.node("Slice", [translator.tensor(x).name, *names], shape)


def _reshape(translator, shape, x, **_):
    x = translator.tensor(x)
    if len(shape) == 0 or x.shape[0] != shape[0]:
        raise InputError("the network changes the batch's size: no ONNX rule")
    if len(x.shape) == 4 and x.shape[1:3] != (1, 1):
        order = {"perm": (0, 2, 3, 1)}
        x = translator.graph.node("Transpose", [x.name], x.shape, **order)
    if len(shape) == 4 and shape[1:3] != (1, 1):
        raise InputError("the network has a reshape for which there is no ONNX rule")
    sizes = np.asarray([0, *_in_graph_order(shape)[1:]], np.int64)  # 0: the batch's
    inputs = [x.name, translator.graph.constant(sizes)]
    return translator.graph.node("Reshape", inputs, shape)


def _broadcast(translator, shape, x, /, **_):
    if np.prod(shape) != np.prod(x.shape):
        raise InputError("the network repeats an activation: no ONNX rule")
    return _reshape(translator, shape, x)


def _convert(translator, shape, x, *, new_dtype, **_):
    """Pixels to float32; between floats there is nothing to do."""
    if new_dtype != np.float32:
        raise InputError(f"the network computes in {new_dtype}: no ONNX rule")
    x = translator.tensor(x)
    return translator.graph.node("Cast", [x.name], shape, to=onnx.TensorProto.FLOAT)


def _window(params: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a pooling over height and width.

    Raises:
      InputError: it is another.
    """
    dilations = (*params["base_dilation"], *params["window_dilation"])
    sizes, strides = params["window_dimensions"], params["window_strides"]
    ends = [values[axis] for values in (sizes, strides) for axis in (0, -1)]
    padding = [tuple(map(int, pair)) for pair in params["padding"]]
    if (
        len(sizes) != 4
        or set(dilations) != {1}
        or set(ends) != {1}
        or padding[0] + padding[3] != (0,) * 4
    ):
        raise InputError("the network has a pooling for which there is no ONNX rule")
    return {
        "kernel_shape": sizes[1:3],
        "strides": strides[1:3],
        "pads": [pair[end] for end in (0, 1) for pair in padding[1:3]],
    }


def _max_pool(translator, shape, x, **params):
    if isinstance(x, Quantized):
        # ONNX Runtime pools codes, but not those of 4 bits. After the pooling it is
        # the same, since a quantizer keeps the order.
        pooled = _max_pool(translator, shape, x.x, **params)
        return Quantized(pooled, x.parameters, whole_bytes=True)
    name = translator.tensor(x).name
    return translator.graph.node("MaxPool", [name], shape, **_window(params))


def _sum_pool(translator, shape, x, **params):
    """A mean times the window's size: ONNX has no sum. Padding counts as zeros."""
    window = _window(params)
    name = translator.tensor(x).name
    mean = translator.graph.node(
        "AveragePool", [name], shape, count_include_pad=1, **window
    )
    size = translator.graph.constant(np.float32(np.prod(window["kernel_shape"])))
    return translator.graph.node("Mul", [mean.name, size], shape)


def _reduce_max(translator, shape, x, *, axes, **_):
    x = translator.tensor(x)
    if len(x.shape) != 4 or tuple(axes) != (1, 2):
        raise InputError("the network has a maximum for which there is no ONNX rule")
    # ReduceMax takes its axes in another way from opset 18 on.
    one = (x.shape[0], 1, 1, x.shape[3])
    x = translator.graph.node("GlobalMaxPool", [x.name], one)
    spatial = translator.graph.constant(np.asarray((2, 3), np.int64))
    return translator.graph.node("Squeeze", [x.name, spatial], shape)


def _concatenate(translator, shape, *parts, dimension):
    if dimension == 0 or any(isinstance(part, np.ndarray) for part in parts):
        raise InputError("the network joins what is no activation: no ONNX rule")
    axis = AXIS[dimension] if len(shape) == 4 else dimension
    names = [translator.tensor(part).name for part in parts]
    return translator.graph.node("Concat", names, shape, axis=axis)


def _select(translator, shape, which, *cases, **_):
    if len(cases) != 2:
        raise InputError("the network selects of several: no ONNX rule")
    names = [translator.operand(value, shape) for value in (which, *cases[::-1])]
    return translator.graph.node("Where", names, shape)


def _comparison(operator: str) -> Callable[..., Any]:
    def rule(translator, shape, a, b, **_):
        names = [translator.operand(value, shape) for value in (a, b)]
        return translator.graph.node(operator, names, shape)

    return rule


def _logistic(translator, shape, x, **_):
    return translator.graph.node("Sigmoid", [translator.tensor(x).name], shape)


_RULES: dict[str, Callable[..., Any]] = {
    "add": _elementwise("Add"),
    "sub": _elementwise("Sub"),
    "mul": _elementwise("Mul"),
    "div": _elementwise("Div"),
    "max": _max,
    "min": _min,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "reduce_sum": _reduce_sum,
    "pad": _pad,
    "slice": _slice,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "copy": lambda translator, shape, x: x,
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _sum_pool,
    "reduce_max": _reduce_max,
    "concatenate": _concatenate,
    "select_n": _select,
    "gt": _comparison("Greater"),
    "ge": _comparison("GreaterOrEqual"),
    "lt": _comparison("Less"),
    "le": _comparison("LessOrEqual"),
    "logistic": _logistic,
}
