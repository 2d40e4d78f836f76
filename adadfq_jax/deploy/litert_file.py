"""Q as a .tflite file, which LiteRT computes in integers.

It is the integer ONNX file in another form: the same codes of kernels, the same scales,
the same biases, and the same activations but for the sign of their bytes (code and zero
point are 128 smaller). JAX evaluates the integer file's nodes with a composite
`quant.fake_quant` at each quantizer, and LiteRT's converter makes types of these.

- Channels come last, as in LiteRT's operators.
- A product that the integer file leaves in float, as the logits, reads and gives 16-bit
  integers: LiteRT has none from integers to float.
- The file takes one image [1, H, W, C] and gives its logits [1, classes].
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax import Array, lax
from onnx import helper, numpy_helper

from adadfq_jax.deploy.onnx_file import OnnxOptions
from adadfq_jax.errors import InputError, first_line
from adadfq_jax.network.onnx_operators import FOLDED, OPERATORS, STATIC

_BOOLEAN = (
    *("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"),
    "Where",
)
_ELEMENTWISE = frozenset({
    *_BOOLEAN, "Abs", "Add", "Cast", "Clip", "Div", "Erf", "Exp", "LeakyRelu", "Log",
    "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Sub",
    "Tanh",
})  # fmt: skip
# Operators that give values of their input, or zeros.
_PICKING = frozenset({
    "Expand", "Flatten", "Gather", "MaxPool", "Pad", "ReduceMax", "ReduceMin",
    "Reshape", "Slice", "Tile", "Transpose",
})  # fmt: skip
_OPERATORS: dict[str, Callable[..., Any]] = {
    **OPERATORS,
    **{name: getattr(jnp, FOLDED[name].__name__) for name in _BOOLEAN},
    "Cast": lambda x, *, to: x.astype(helper.tensor_dtype_to_np_dtype(to)),
    "Shape": lambda x: np.asarray(x.shape),
    "Tile": lambda x, repeats: jnp.tile(x, repeats),
}


class _Grid(NamedTuple):
    """The scale and the zero point of a tensor of signed integers."""

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        least, most = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        low, high = ((code - self.zero_point) * self.scale for code in (least, most))
        return low, high

    def covers(self, other: "_Grid") -> bool:
        """Tell whether the other grid's ends lie between this one's."""
        (low, high), (least, most), half = self.ends, other.ends, self.scale / 2
        return low - half < least and most < high + half


# The grids on which LiteRT computes these in integers.
_FIXED = {"Sigmoid": _Grid(1 / 256, -128), "Tanh": _Grid(1 / 128, 0)}


def _marked(values: Array, scale: Any, zero_point: Any, bits: int, **more: Any) -> Any:
    """Mark values to be quantized by the converter."""
    # The converter drops a composite that returns its operand.
    mark = lax.composite(lambda x, **_: x * 1, name="quant.fake_quant")
    scale, zero_point = np.float32(scale), np.int64(zero_point)
    more = {"narrow_range": False, **more}
    return mark(values, scale=scale, zero_point=zero_point, dtype=f"i{bits}", **more)


class _Kernel(NamedTuple):
    """A kernel, int8 [out, ...], with a scale per output channel."""

    name: str
    codes: np.ndarray
    scale: np.ndarray

    def ordered(self, order: Sequence[int]) -> Array:
        """Return the real values with their axes in another order."""
        axis = list(order).index(0)
        sizes = [1] * len(order)
        sizes[axis] = -1
        real = self.codes.transpose(order) * self.scale.reshape(sizes)
        own = {"quantization_dimension": np.int32(axis), "narrow_range": True}
        with jax.named_scope(self.name):
            zeros = np.zeros(len(self.scale))
            return _marked(jnp.asarray(real), self.scale, zeros, 8, **own)


class _Tensor(NamedTuple):
    """A tensor of the program.

    Attributes:
      values: the values.
      order: axis i is the integer file's axis order[i].
      grid: the grid that the values lie on, or None.
    """

    values: Any
    order: tuple[int, ...]
    grid: _Grid | None = None

    def on(self, grid: _Grid | None) -> "_Tensor":
        """Round the values to a grid; None changes nothing."""
        if grid is None or grid == self.grid:
            return self
        values = self.values
        if self.grid is not None and not self.grid.covers(grid):
            # The converter would leave out the first of two roundings, and with it the
            # ends of its grid, which may be those of a ReLU. It does not beyond this.
            flat = _Tensor(values.reshape(-1), (0,)).on(self.grid)
            values = flat._replace(grid=None).on(grid).values.reshape(values.shape)
        marked = _marked(values, [grid.scale], [grid.zero_point], grid.bits)
        return _Tensor(marked, self.order, grid)

    def ordered(self, order: Sequence[int]) -> Any:
        """Return the values with their axes in another order."""
        if (order := tuple(order)) == self.order:
            return self.values
        axes = [self.order.index(axis) for axis in order]
        sizes = [self.values.shape[axis] for axis in axes]
        long = [axis for axis, size in zip(axes, sizes, strict=True) if size > 1]
        is_same = long == sorted(long)
        moved = self.values.reshape(sizes) if is_same else self.values.transpose(axes)
        return _Tensor(moved, order).on(self.grid).values


def _tensor(value: Any) -> _Tensor:
    """Return a kernel or a constant as a tensor."""
    if isinstance(value, _Tensor):
        return value
    rank = value.codes.ndim if isinstance(value, _Kernel) else value.ndim
    order = tuple(range(rank))
    is_kernel = isinstance(value, _Kernel)
    return _Tensor(value.ordered(order) if is_kernel else jnp.asarray(value), order)


def _ordered(kernel: Any, order: Sequence[int]) -> Array:
    """Return the real values of a kernel or a constant in another order of axes."""
    return (kernel if isinstance(kernel, _Kernel) else _tensor(kernel)).ordered(order)


class _Program:
    """The integer file as a function of JAX.

    Args:
      model: the integer file.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes, made = model.graph.node, model.graph.initializer
        self._constants = {each.name: numpy_helper.to_array(each) for each in made}
        # By the edge that is rounded.
        self._grids = {
            node.input[0]: self._grid(node)
            for node in self._nodes
            if node.op_type == "QuantizeLinear"
        }
        ends = ("Clip", "Relu")
        self._cut = {node.input[0] for node in self._nodes if node.op_type in ends}

    def _grid(self, node: onnx.NodeProto) -> _Grid:
        scale, zero_point = (self._constants[name] for name in node.input[1:])
        offset = 128 if zero_point.dtype == np.uint8 else 0
        return _Grid(float(scale), int(zero_point) - offset)

    def __call__(self, images: Array, order: tuple[int, ...]) -> Array:
        """Return the logits of images with their axes in an order."""
        values: dict[str, Any] = {**self._constants, "images": _Tensor(images, order)}
        for node in self._nodes:
            inputs = [values[name] if name else None for name in node.input]
            with jax.named_scope(node.output[0]):
                values[node.output[0]] = self._evaluate(node, *inputs)
        return values["logits"].ordered((0, 1))

    def _evaluate(self, node: onnx.NodeProto, x: Any, *others: Any) -> Any:
        name, edge = node.op_type, node.output[0]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        match name:
            case "Identity":
                return x
            case "QuantizeLinear":
                return _tensor(x)
            case "DequantizeLinear" if isinstance(x, _Tensor):
                return x.on(self._grid(node))
            case "DequantizeLinear" if x.dtype == np.int8:
                return _Kernel(node.input[0], x, others[0])
            case "DequantizeLinear":  # a bias
                return (x * others[0].astype(np.float64)).astype(np.float32)
            case "Transpose" if isinstance(x, _Tensor):
                places = list(attributes["perm"])
                return x._replace(order=tuple(map(places.index, x.order)))
            case "Conv":
                return _convolution(x, *others, **attributes)
            case "Gemm":
                is_float = edge not in self._grids and edge not in self._cut
                return _product(x, *others, is_float=is_float)
            case "GlobalAveragePool":
                axes = [at for at, axis in enumerate(x.order) if axis > 1]
                return _Tensor(x.values.mean(axes, keepdims=True), x.order)
            case "AveragePool" | "MaxPool":
                return _pool(name, x, **attributes)
            case "Concat" if isinstance(x, _Tensor):
                return _joined((x, *others), attributes["axis"], self._grids.get(edge))
        return _general(name, (x, *others), attributes)


def _pairs(pads: Sequence[int]) -> list[tuple[int, int]]:
    half = len(pads) // 2
    return list(zip(pads[:half], pads[half:], strict=True))


def _channels_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


def _convolution(x, kernel, bias=None, *, strides, pads, dilations, group, **_):
    order, spatial = _channels_last(len(x.order)), "DHW"[5 - len(x.order) :]
    shape = kernel.codes.shape if isinstance(kernel, _Kernel) else kernel.shape
    is_depthwise = group > 1 and shape[1] == 1
    # The forms that LiteRT's operators read.
    form = (*order[1:-1], 1, 0) if is_depthwise else order
    y = lax.conv_general_dilated(
        x.ordered(order),
        _ordered(kernel, form),
        strides,
        _pairs(pads),
        rhs_dilation=dilations,
        dimension_numbers=(
            f"N{spatial}C",
            f"{spatial}IO" if is_depthwise else f"O{spatial}I",
            f"N{spatial}C",
        ),
        feature_group_count=group,
    )
    return _Tensor(y if bias is None else y + bias, order)


def _product(x, kernel, bias=None, *, is_float):
    """Multiply by a kernel [out, in]; where `is_float`, in 16 bits."""
    grid, bias = None, np.float32(0) if bias is None else bias
    x = _Tensor(x.ordered((0, 1)), (0, 1), x.grid)
    if is_float and isinstance(kernel, _Kernel) and x.grid is not None:
        real, (low, high) = kernel.codes * kernel.scale[:, None], x.grid.ends
        most = np.maximum(real * low, real * high).sum(1) + bias
        least = np.minimum(real * low, real * high).sum(1) + bias
        bound = float(max(np.abs(most).max(), np.abs(least).max()))
        grid = _Grid(bound / (2**15 - 1) or 1.0, 0, 16)
        x = x.on(_Grid(x.grid.scale, 0, 16))
    k = _ordered(kernel, (0, 1))
    y = lax.dot_general(x.values, k, (((1,), (1,)), ((), ())))
    return _Tensor(y + bias if np.any(bias) else y, (0, 1)).on(grid)


def _pool(name, x, *, kernel_shape, strides, pads, dilations=None, **_):
    dilations, order = dilations or [1] * len(strides), _channels_last(len(x.order))
    values = x.ordered(order)
    if name == "AveragePool":  # a mean of integers, as a convolution
        shape = (values.shape[-1], 1, *kernel_shape)
        scale = np.full(shape[0], 1 / (127 * np.prod(kernel_shape)), np.float32)
        mean = _Kernel("mean", np.full(shape, 127, np.int8), scale)
        window = {"strides": strides, "pads": pads, "dilations": dilations}
        return _convolution(x, mean, **window, group=shape[0])
    y = lax.reduce_window(
        values,
        -jnp.inf,
        lax.max,
        (1, *kernel_shape, 1),
        (1, *strides, 1),
        [(0, 0), *_pairs(pads), (0, 0)],
        window_dilation=(1, *dilations, 1),
    )
    return _Tensor(y, order).on(x.grid)


def _joined(parts: Sequence[Any], axis: int, grid: _Grid | None) -> _Tensor:
    """Concatenate tensors, which LiteRT wants on the grid of the result."""
    parts = [_tensor(part) for part in parts]
    order = parts[0].order
    arrays = [
        _Tensor(part.ordered(order), order, part.grid).on(grid).values for part in parts
    ]
    whole = jnp.concatenate(arrays, order.index(axis % len(order)))
    return _Tensor(whole, order).on(grid)


def _general(name: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Evaluate an operator as `onnx_operators` does."""
    if name not in _OPERATORS:
        raise InputError(
            f"the network has {name!r}, for which there is no LiteRT rule;"
            " export.target=onnxruntime leaves quantized.tflite out"
        )
    static, kept, found = STATIC.get(name, {}), [], dict(attributes)
    for at, x in enumerate(inputs):
        if at not in static:
            kept.append(_tensor(x) if isinstance(x, _Kernel) else x)
        elif x is not None:
            is_number = static[at] in ("max", "min", "value")
            found[static[at]] = x.item() if is_number else x.tolist()
    if "mode" in found:
        found["mode"] = found["mode"].decode()
    tensors = [x for x in kept if isinstance(x, _Tensor)]
    if not tensors:
        return _OPERATORS[name](*kept, **found)
    order, ranks = tensors[0].order, {len(x.order) for x in tensors}
    is_aligned = name in _ELEMENTWISE and len(ranks) == 1

    def read(x: Any) -> Any:
        if isinstance(x, _Tensor):
            return x.ordered(order if is_aligned else range(len(x.order)))
        if is_aligned and x.ndim:
            x = x.reshape((1,) * (len(order) - x.ndim) + x.shape).transpose(order)
        return x

    y = _OPERATORS[name](*map(read, kept), **found)
    if isinstance(y, np.ndarray):
        return y
    made = _Tensor(y, order if is_aligned else tuple(range(y.ndim)))
    grid = tensors[0].grid
    return made.on(grid if name in _PICKING else grid and _FIXED.get(name))


def to_litert(
    model: onnx.ModelProto, options: OnnxOptions, image_shape: Sequence[int]
) -> bytes:
    """Convert the integer file to a .tflite file.

    Args:
      model: the integer file, see `onnx_integer`.
      options: of the integer file. The .tflite file takes an image NHWC in any case.
      image_shape: (H, W, channels).

    Raises:
      InputError: the network has an operation that the converter does not take.
    """
    from litert_converter.mlir import ir, passmanager  # here: an optional extra
    from litert_converter.mlir._mlir_libs import converter_api_ext as converter

    program, code, context = _Program(model), io.BytesIO(), ir.Context()
    order = (0, 2, 3, 1) if options.layout == "NCHW" else (0, 1, 2, 3)
    dtype = np.uint8 if options.pixels else np.float32

    def logits(images: Array) -> Array:
        return program(images, order)

    try:
        images = jax.ShapeDtypeStruct((1, *image_shape), dtype)
        stablehlo: Any = jax.jit(logits).lower(images).compiler_ir("stablehlo")
        stablehlo.operation.write_bytecode(code)
        converter.prepare_mlir_context(context)
        with context:
            module = ir.Module.parse(code.getvalue())
            (function, *_) = module.operation.regions[0].blocks[0].operations
            converter.set_signature(function, "serving_default", ["images"], ["logits"])
            wanted = converter.ConvertToTFLConfig()
            wanted.model_origin_framework = "PYTORCH"  # its composites are quantizers
            wanted.qdq_conversion_mode, wanted.strict_qdq_mode = "STATIC", True
            passes = passmanager.PassManager()
            converter.run_convert_to_tfl_passes(module, passes, wanted)
            return converter.export_flatbuffer_to_bytes(module.operation)
    except InputError:
        raise
    except Exception as error:  # whatever JAX and the converter raise
        _, _, said = str(error).partition("error: ")
        said = first_line(ValueError(said)) if said else first_line(error)
        raise InputError(
            f"the network cannot be converted for LiteRT ({said});"
            " export.target=onnxruntime leaves quantized.tflite out"
        ) from error
