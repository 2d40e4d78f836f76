"""An ONNX graph under construction: nodes, constants and quantized tensors.

Kernels and activations are wrapped in QuantizeLinear / DequantizeLinear pairs (kernels,
being constant, in the second alone), kernels per output channel. Types are the
narrowest that hold the bits, and with them come the versions of ONNX that have them:

    UINT8    opset 13, IR 8
    UINT4    opset 21, IR 10    two codes to a byte
    UINT2    opset 25, IR 13    four codes to a byte; kernels only
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from adadfq_jax.deploy.codes import Kernel, Range, storage_bits

AXIS = (0, 2, 3, 1)  # of NHWC's axes in NCHW

_TYPES = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
_OPSET_AND_IR = {2: (25, 13), 4: (21, 10), 8: (13, 8)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An edge of the graph. Shapes are Flax's: of rank 4, it is NCHW in the graph."""

    name: str
    shape: tuple[int, ...]


def channels_first(array: np.ndarray) -> np.ndarray:
    """NHWC -> NCHW at rank 4; others stay."""
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array


def features_first(kernel: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW, [in, out] -> [out, in]."""
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


class Graph:
    """Nodes and constants in the order in which they were added.

    Args:
      uint8_only: whether codes of less than 8 bits take a byte each, for runtimes
        that do not know the narrow types.
    """

    def __init__(self, uint8_only: bool = False):
        self._narrowest = 8 if uint8_only else 2
        self._widths = {8}  # of the codes so far
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, array: Any, name: str = "") -> str:
        """Adds an array, packed if its type is narrower than a byte; its name.

        A second array of a name gets a number: a kernel that is used twice is there
        twice where the batch norms behind it differ, and once where it is the same.
        """
        array = np.ascontiguousarray(array)
        wanted = name or f"constant_{len(self.constants)}"
        name, use = wanted, 1
        while True:
            made = numpy_helper.from_array(array, name)
            if self.constants.setdefault(name, made) == made:
                return name
            use += 1
            name = f"{wanted}.{use}"

    def node(
        self, operator: str, inputs: Sequence[str], shape: tuple[int, ...], **attributes
    ) -> Tensor:
        """Adds a node with one output of the given shape."""
        name = f"{operator}_{len(self.nodes)}"
        made = helper.make_node(operator, inputs, [name], name, **attributes)
        self.nodes.append(made)
        return Tensor(name, shape)

    def output(self, x: Tensor, name: str) -> None:
        """Names an edge as an output of the graph."""
        self.nodes.append(helper.make_node("Identity", [x.name], [name], name))

    def kernel(self, name: str, kernel: Kernel) -> str:
        """Adds a kernel, output channel first; the name of its real values."""
        codes, dtype = features_first(kernel.codes), self._type(kernel.bits)
        inputs = [
            self.constant(codes.astype(dtype), name),
            self.constant(kernel.scale, f"{name}.scale"),
            self.constant(kernel.stored_zero_point.astype(dtype), f"{name}.zero_point"),
        ]
        real = self.node("DequantizeLinear", inputs, codes.shape, axis=0)
        if kernel.offset.any():
            offset = kernel.offset.reshape(-1, *[1] * (codes.ndim - 1))
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
        if offset:
            x = self.node("Sub", [x.name, self.constant(offset)], x.shape)
        if top < ml_dtypes.iinfo(dtype).max:
            ends = [np.float32((end - zero_point) * scale) for end in (0, top)]
            names = [self.constant(end) for end in ends]
            x = self.node("Clip", [x.name, *names], x.shape)
        with_zero_point = [
            self.constant(scale),
            self.constant(np.asarray(zero_point, dtype)),
        ]
        x = self.node("QuantizeLinear", [x.name, *with_zero_point], x.shape)
        x = self.node("DequantizeLinear", [x.name, *with_zero_point], x.shape)
        if offset:
            x = self.node("Add", [x.name, self.constant(offset)], x.shape)
        return x

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: dict[str, str],
    ) -> onnx.ModelProto:
        """The finished model, checked by ONNX; metadata goes to its properties."""
        graph = helper.make_graph(
            self.nodes, "adadfq_jax", inputs, outputs, list(self.constants.values())
        )
        opset, ir_version = _OPSET_AND_IR[min(self._widths)]
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=ir_version,
            producer_name="adadfq_jax",
        )
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model
