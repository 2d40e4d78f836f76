"""The ONNX operators that can be read, as functions of arrays.

A function takes the tensors of a node by position and its attributes by name. Inputs
that say where or how far, such as the shape of a Reshape, are attributes here, under
the names in `STATIC`. The functions of `FOLDED` are computed in numpy only, while a
file is read. Those of `EITHER` take numpy arrays as well: the arithmetic on shapes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MOST_NUMBERS = 2**20  # in an array that is computed while a file is read
MOST_STEPS = 2**13  # of a window, a stride, a padding or a dilation
MOST_POSITIONS = 2**24  # of a window, and of its pixels along an axis


def _xp(*arrays: Any) -> Any:
    """Return numpy where all arrays are numpy's, else jax.numpy."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _aligned(*arrays: Any) -> list[Any]:
    """Give arrays the same number of axes, as ONNX does to broadcast them."""
    rank = max(x.ndim for x in arrays)
    return [
        x.reshape((1,) * (rank - x.ndim) + x.shape) if x.ndim else x for x in arrays
    ]


def _either(name: str) -> Callable[..., Any]:
    """Make an operator of the function that numpy and jax.numpy both have."""

    def operator(*arrays: Any) -> Any:
        return getattr(_xp(*arrays), name)(*_aligned(*arrays))

    return operator


def _of_several(name: str) -> Callable[..., Any]:
    both = _either(name)

    def operator(*arrays: Any) -> Any:
        total = arrays[0]
        for array in arrays[1:]:
            total = both(total, array)
        return total

    return operator


# Convolutions, products and norms.


def _window(
    x: Any,
    size: Sequence[int],
    strides: Sequence[int] | None,
    pads: Sequence[int] | None,
    dilations: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: int = 0,
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Return strides, paddings (before, after) and dilations of each spatial axis."""
    rank = x.ndim - 2
    steps = list(strides or [1] * rank)
    gaps = list(dilations or [1] * rank)
    given = list(pads or [0] * 2 * rank)
    for least, value in (
        *((1, value) for value in (*size, *steps, *gaps)),
        *((0, value) for value in given),
    ):
        if not least <= value <= MOST_STEPS:
            raise ValueError(f"a window, stride, padding or dilation of {value}")
    if not len(size) == len(steps) == len(gaps) == len(given) // 2 == rank:
        raise ValueError(f"its attributes do not fit a tensor of {rank + 2} axes")
    ends = []
    for axis in range(rank):
        length, reach = x.shape[axis + 2], (size[axis] - 1) * gaps[axis] + 1
        before, after = given[axis], given[axis + rank]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            out = -(-length // steps[axis])
            total = max((out - 1) * steps[axis] + reach - length, 0)
            before = total // 2 if auto_pad == "SAME_UPPER" else -(-total // 2)
            after = total - before
        elif auto_pad == "VALID":
            before = after = 0
        elif auto_pad not in ("", "NOTSET"):
            raise ValueError(f"auto_pad {auto_pad!r}")
        if ceil_mode:
            padded = length + before + after
            out = -(-(padded - reach) // steps[axis]) + 1
            if (out - 1) * steps[axis] >= length + before:
                out -= 1  # the last window would begin in the padding
            after += max((out - 1) * steps[axis] + reach - padded, 0)
        ends.append((before, after))
    return steps, ends, gaps


def _conv(
    x,
    kernel,
    bias=None,
    *,
    strides=None,
    pads=None,
    dilations=None,
    group=1,
    auto_pad="",
    kernel_shape=None,
):
    size = kernel.shape[2:]
    steps, ends, gaps = _window(x, size, strides, pads, dilations, auto_pad)
    spatial = "DHW"[3 - len(size) :]
    y = lax.conv_general_dilated(
        x,
        kernel,
        steps,
        ends,
        rhs_dilation=gaps,
        dimension_numbers=(f"NC{spatial}", f"OI{spatial}", f"NC{spatial}"),
        feature_group_count=group,
    )
    return y if bias is None else y + _per_channel(bias, y)


def _per_channel(values, x):
    """Reshape values [C] so that they broadcast over x [B, C, ...]."""
    return jnp.reshape(values, (1, -1, *[1] * (x.ndim - 2)))


def _gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    y = (a.T if transA else a) @ (b.T if transB else b)
    y = y if alpha == 1 else alpha * y
    if c is None:
        return y
    y, c = _aligned(y, c)
    return y + (c if beta == 1 else beta * c)


def _matmul(x, y):
    if y.ndim == 2 and x.ndim > 2:
        return jnp.tensordot(x, y, 1)
    return jnp.matmul(x, y)


def _divide(x, y):
    x, y = _aligned(x, y)
    if not x.dtype.kind == y.dtype.kind == "i":
        return x / y
    return (x - _xp(x, y).fmod(x, y)) // y  # ONNX cuts whole numbers toward 0


def _batch_norm(
    x, scale, bias, mean, var, *, epsilon=1e-5, training_mode=0, momentum=0.9
):
    if training_mode:
        raise ValueError(
            "a batch norm in training mode; call model.eval() before the export"
        )
    factor = lax.rsqrt(var + epsilon) * scale
    centred = x - _per_channel(mean, x)
    return centred * _per_channel(factor, x) + _per_channel(bias, x)


def _layer_norm(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1):
    axes = tuple(range(axis % x.ndim, x.ndim))
    centred = x - jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    y, scale = _aligned(centred * lax.rsqrt(variance + epsilon), scale)
    y = y * scale
    return y if bias is None else _either("add")(y, bias)


# Pools and reductions.


def _max_pool(
    x,
    *,
    kernel_shape,
    strides=None,
    pads=None,
    dilations=None,
    auto_pad="",
    ceil_mode=0,
    storage_order=0,
):
    steps, ends, gaps = _window(
        x, kernel_shape, strides, pads, dilations, auto_pad, ceil_mode
    )
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        (1, 1, *kernel_shape),
        (1, 1, *steps),
        ((0, 0), (0, 0), *ends),
        window_dilation=(1, 1, *gaps),
    )


def _average_pool(
    x,
    *,
    kernel_shape,
    strides=None,
    pads=None,
    dilations=None,
    auto_pad="",
    ceil_mode=0,
    count_include_pad=0,
):
    steps, ends, gaps = _window(
        x, kernel_shape, strides, pads, dilations, auto_pad, ceil_mode
    )
    _, plain, _ = _window(x, kernel_shape, strides, pads, dilations, auto_pad)
    y = lax.reduce_window(
        x,
        0.0,
        lax.add,
        (1, 1, *kernel_shape),
        (1, 1, *steps),
        ((0, 0), (0, 0), *ends),
        window_dilation=(1, 1, *gaps),
    )
    along = []  # pixels of a window in all its places along each axis
    for axis, size in enumerate(kernel_shape):
        before, after = plain[axis] if count_include_pad else (0, 0)
        if y.shape[axis + 2] * size > MOST_POSITIONS:
            raise ValueError(f"a window of {size} pixels over {x.shape}")
        # [positions of the window, positions in it]
        at = np.arange(y.shape[axis + 2])[:, None] * steps[axis] - ends[axis][0]
        at = at + np.arange(size) * gaps[axis]
        inside = (at >= -before) & (at < x.shape[axis + 2] + after)
        along.append(inside.sum(1).astype(np.float32))
    if all(np.ptp(counts) == 0 for counts in along):
        return y * (1 / math.prod(counts[0] for counts in along))
    if math.prod(y.shape[2:]) > MOST_POSITIONS:
        raise ValueError(f"windows over {y.shape[2:]} places")
    counts = functools.reduce(np.multiply.outer, along)
    return y * (1 / counts).reshape(1, 1, *counts.shape)


def _global_pool(reduce):
    return lambda x: reduce(x, tuple(range(2, x.ndim)), keepdims=True)


def _reduce(name: str) -> Callable[..., Any]:
    def operator(x, *, axes=None, keepdims=1, noop_with_empty_axes=0):
        if not axes:
            if noop_with_empty_axes:
                return x
            axes = range(x.ndim)
        return getattr(_xp(x), name)(x, tuple(axes), keepdims=bool(keepdims))

    return operator


def _reduce_l2(x, *, axes=None, keepdims=1, noop_with_empty_axes=0):
    ways = {"keepdims": keepdims, "noop_with_empty_axes": noop_with_empty_axes}
    return jnp.sqrt(_reduce("sum")(jnp.square(x), axes=axes, **ways))


# Nonlinearities.


def _clip(x, *, min=None, max=None):
    if isinstance(x, np.ndarray):
        return np.clip(x, min, max)
    if min is not None:
        x = jax.nn.relu(x) if min == 0 else jnp.maximum(x, min)
    return x if max is None else jnp.minimum(x, max)


def _hard_sigmoid(x, *, alpha=0.2, beta=0.5):
    return _clip(alpha * x + beta, min=0.0, max=1.0)


def _softmax(of):
    def operator(x, *, axis=-1, flattened=0):
        if not flattened:
            return of(x, axis)
        # Before opset 13, all axes from this one on are taken together.
        return of(x, tuple(range(axis % x.ndim, x.ndim)))

    return operator


def _gelu(x, *, approximate="none"):
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _prelu(x, slope):
    x, slope = _aligned(x, slope)
    return jnp.where(x < 0, slope * x, x)


# Shapes.


def bounded(shape: Sequence[int]) -> tuple[int, ...]:
    """Refuse the shape of an array that is too large to be computed while reading."""
    sizes = tuple(map(int, shape))
    if min(sizes, default=0) < 0 or math.prod(sizes) > MOST_NUMBERS:
        raise ValueError(f"an array of shape {sizes} computed from constants")
    return sizes


def _reshape(x, *, shape, allowzero=0):
    sizes = [
        x.shape[axis] if size == 0 and not allowzero else size
        for axis, size in enumerate(shape)
    ]
    return x.reshape(sizes)


def _flatten(x, *, axis=1):
    axis = axis % x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(x, *, axes=None):
    return x.squeeze(None if axes is None else tuple(axes))


def _unsqueeze(x, *, axes):
    return _xp(x).expand_dims(x, tuple(axes))


def _transpose(x, *, perm=None):
    return x.transpose(perm)


def _expand(x, *, shape):
    sizes = np.broadcast_shapes(x.shape, tuple(shape))
    if isinstance(x, np.ndarray):
        return np.broadcast_to(x, bounded(sizes))
    return x if sizes == x.shape else jnp.broadcast_to(x, sizes)


def _concat(*arrays, axis):
    return _xp(*arrays).concatenate(arrays, axis)


def _split(x, *, axis=0, split=None, num_outputs=None):
    length = x.shape[axis]
    if split is None:
        if not 1 <= num_outputs <= max(length, 1):
            raise ValueError(f"{num_outputs} parts of an axis of {length}")
        size = -(-length // num_outputs)
        split = [min(size, length - i * size) for i in range(num_outputs)]
    if sum(split) != length or min(split) < 0:
        raise ValueError(f"parts of {list(split)} of an axis of {length}")
    return _xp(x).split(x, list(np.cumsum(split)[:-1]), axis)


def _slice(x, *, starts, ends, axes=None, steps=None):
    places = [slice(None)] * x.ndim
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # Python would count an end before the axis from its other end.
        end = None if step < 0 and end < -x.shape[axis] else end
        places[axis] = slice(start, end, step)
    return x[tuple(places)]


def _gather(x, *, indices, axis=0):
    where = np.asarray(indices)
    length = x.shape[axis]
    if where.size and not (-length <= where.min() and where.max() < length):
        raise ValueError(f"an index beyond an axis of {length}")
    if isinstance(x, np.ndarray):
        rest = x.size // max(length, 1)
        bounded((where.size, rest))
        return np.take(x, where, axis)
    if where.ndim == 0:
        return lax.index_in_dim(x, int(where), axis, keepdims=False)
    return jnp.take(x, where % length, axis)


def _pad(x, *, pads, value=0.0, axes=None, mode="constant"):
    axes = range(x.ndim) if axes is None else axes
    if len(pads) != 2 * len(axes) or max(map(abs, pads), default=0) > MOST_STEPS:
        raise ValueError(f"pads {list(pads)[:8]} of a tensor of {x.ndim} axes")
    ends = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        ends[axis] = pads[i], pads[i + len(axes)]
    if mode == "constant":
        return lax.pad(x, jnp.asarray(value, x.dtype), [(*e, 0) for e in ends])
    modes = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
    return jnp.pad(x, ends, modes[mode])


# The place in the original, from 0 to its length, of every place in the result.
_PLACES: dict[str, Callable[..., Any]] = {
    "align_corners": lambda at, scale, length, size: (
        at * np.float32(length - 1) / np.float32(max(size - 1, 1))
    ),
    "asymmetric": lambda at, scale, length, size: at / scale,
    "half_pixel": lambda at, scale, length, size: (at + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda at, scale, length, size: (
        (at + 0.5) / scale - 0.5 if size > 1 else 0 * at
    ),
}
_ROUNDED: dict[str, Callable[..., Any]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    # A half may be off by its last bits.
    "round_prefer_floor": lambda at: np.ceil(np.round(at, 5) - 0.5),
}


def _resize(
    x,
    *,
    axes,
    sizes=None,
    scales=None,
    mode="nearest",
    coordinate_transformation_mode="half_pixel",
    nearest_mode="round_prefer_floor",
    antialias=0,
    keep_aspect_ratio_policy="stretch",
    cubic_coeff_a=-0.75,
    exclude_outside=0,
    extrapolation_value=0.0,
):
    """Resize axes, one after the other; places are those that ONNX Runtime finds."""
    for name, value, read in (
        ("mode", mode, ("linear", "nearest")),
        ("coordinate_transformation_mode", coordinate_transformation_mode, _PLACES),
        ("nearest_mode", nearest_mode, _ROUNDED),
        ("antialias", antialias, (0,)),
        ("keep_aspect_ratio_policy", keep_aspect_ratio_policy, ("stretch",)),
    ):
        if value not in read and (name != "nearest_mode" or mode == "nearest"):
            raise ValueError(f"its {name} {value!r} is not read")
    places = _PLACES[coordinate_transformation_mode]
    for axis, by in zip(axes, sizes or scales, strict=True):
        length = x.shape[axis]
        scale = np.float32(by) / np.float32(length) if sizes else np.float32(by)
        size = by if sizes else int(np.floor(np.float32(length) * scale))
        if size == length and scale == 1:
            continue
        # Runtimes differ where the scale is not 1 and the length stays.
        if not 1 <= size <= MOST_STEPS or size == length:
            raise ValueError(f"an axis of {length} resized to {size}")
        at = places(np.arange(size, dtype=np.float32), scale, length, size)
        if mode == "nearest":
            where = np.clip(_ROUNDED[nearest_mode](at), 0, length - 1).astype(int)
            x = jnp.take(x, where, axis)
            continue
        at = np.clip(at, 0, length - 1)
        # [places in the original, places in the result]
        bounded((length, size))
        weights = np.maximum(1 - np.abs(np.arange(length)[:, None] - at), 0)
        weights = jnp.asarray(weights, x.dtype)
        x = jnp.moveaxis(jnp.tensordot(x, weights, ((axis,), (0,))), -1, axis)
    return x


OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": _either("abs"),
    "Add": _either("add"),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _divide,
    "Elu": lambda x, *, alpha=1.0: jax.nn.elu(x, alpha),
    "Erf": lax.erf,
    "Exp": jnp.exp,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(jnp.mean),
    "GlobalMaxPool": _global_pool(jnp.max),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda x: x * _hard_sigmoid(x, alpha=1 / 6),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, *, alpha=0.01: jax.nn.leaky_relu(x, alpha),
    "Log": jnp.log,
    "LogSoftmax": _softmax(jax.nn.log_softmax),
    "MatMul": _matmul,
    "Max": _of_several("maximum"),
    "MaxPool": _max_pool,
    "Min": _of_several("minimum"),
    "Mul": _either("multiply"),
    "Neg": _either("negative"),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _either("power"),
    "Reciprocal": lambda x: 1 / x,
    "ReduceL2": _reduce_l2,
    "ReduceMax": _reduce("max"),
    "ReduceMean": _reduce("mean"),
    "ReduceMin": _reduce("min"),
    "ReduceProd": _reduce("prod"),
    "ReduceSum": _reduce("sum"),
    "Relu": jax.nn.relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": jax.nn.sigmoid,
    "Slice": _slice,
    "Softmax": _softmax(jax.nn.softmax),
    "Softplus": jax.nn.softplus,
    "Split": _split,
    "Sqrt": _either("sqrt"),
    "Squeeze": _squeeze,
    "Sub": _either("subtract"),
    "Sum": _of_several("add"),
    "Tanh": jnp.tanh,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
# These compute new arrays of constants alone; all others need a tensor.
# fmt: off
EITHER = frozenset({
    "Abs", "Add", "Clip", "Concat", "Div", "Expand", "Flatten", "Gather", "Max", "Min",
    "Mul", "Neg", "Pow", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape",
    "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Transpose", "Unsqueeze",
})
# fmt: on


def _constant_of_shape(*, shape, value=0.0):
    return np.full(bounded(shape), value)


def _range(*, start, limit, delta):
    count = max(math.ceil((limit - start) / delta), 0)
    return start + delta * np.arange(*bounded([count]))


FOLDED: dict[str, Callable[..., Any]] = {
    "And": np.logical_and,
    "Ceil": np.ceil,
    "ConstantOfShape": _constant_of_shape,
    "Equal": np.equal,
    "Floor": np.floor,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Mod": lambda x, y, *, fmod=0: np.fmod(x, y) if fmod else np.mod(x, y),
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Range": _range,
    "Where": np.where,
}

# Inputs, by position, that are attributes here.
STATIC: dict[str, dict[int, str]] = {
    "Clip": {1: "min", 2: "max"},
    "ConstantOfShape": {0: "shape"},
    "Expand": {1: "shape"},
    "Gather": {1: "indices"},
    "Pad": {1: "pads", 2: "value", 3: "axes"},
    "Range": {0: "start", 1: "limit", 2: "delta"},
    "Reshape": {1: "shape"},
    "Resize": {1: "roi", 2: "scales", 3: "sizes"},
    "Slice": {1: "starts", 2: "ends", 3: "axes", 4: "steps"},
    "Split": {1: "split"},
    "Squeeze": {1: "axes"},
    "Unsqueeze": {1: "axes"},
    **{
        f"Reduce{name}": {1: "axes"}
        for name in ("L2", "Max", "Mean", "Min", "Prod", "Sum")
    },
}
