"""Rules of `onnx_rules` for windows, and for what networks of your own may have."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from adadfq_jax.deploy.onnx_graph import AXIS
from adadfq_jax.deploy.onnx_values import Quantized
from adadfq_jax.errors import InputError


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


RULES: dict[str, Callable[..., Any]] = {
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
