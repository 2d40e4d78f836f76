"""Q as an ONNX model, and the same network in float32 to compare it with."""

import dataclasses
import json

import numpy as np
import onnx
from onnx import helper

from adadfq_jax.deploy.codes import Kernel, quantize_range
from adadfq_jax.deploy.network import QuantizedNetwork, described
from adadfq_jax.deploy.onnx_graph import Graph, Tensor
from adadfq_jax.deploy.onnx_rules import normalised, translate
from adadfq_jax.deploy.quantized_file import METADATA_KEY


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """The user's choices for an ONNX file.

    Attributes:
      layout: of the images, 'NHWC' or 'NCHW'.
      pixels: whether the model takes uint8 pixels and normalises them; otherwise it
        takes float32 images in normalised space.
      uint8_only: whether every code takes a byte, for runtimes older than opset 21.
    """

    layout: str = "NHWC"
    pixels: bool = False
    uint8_only: bool = False

    def images(self, images: np.ndarray) -> np.ndarray:
        """Bring images [B, H, W, C] into the layout."""
        nchw = self.layout == "NCHW"
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if nchw else images


def to_onnx(
    network: QuantizedNetwork, options: OnnxOptions, *, quantized: bool = True
) -> onnx.ModelProto:
    """Convert the network to an ONNX model: images -> logits [batch, num_classes].

    Batch norms become part of the kernels' scales and of biases, see `onnx_rules`.

    Args:
      network: Q.
      options: see `OnnxOptions`; the model takes batches of any size.
      quantized: whether kernels and activations are quantized; otherwise everything is
        in float32, as in P.

    Raises:
      InputError: the network has an operation for which there is no rule.
    """
    info, traced = network.info, network.graph
    graph = Graph(options.uint8_only)
    height, width, channels = info.image_shape
    shape: list[int | str] = ["batch", height, width, channels]
    order = (0, 1, 2, 3)
    if options.layout == "NCHW":
        shape, order = ["batch", channels, height, width], (0, 3, 1, 2)
    images = Tensor("images", (traced.traced_batch, *info.image_shape), order)
    if options.pixels:
        images = normalised(graph, images, info.mean, info.std, 3)
    if info.layout == "NCHW":  # the layout of the network, not of the file
        images = images.permuted((0, 3, 1, 2))
    kernels: dict[str, Kernel | np.ndarray] = dict(network.kernels)
    bits = info.bits_by_name(traced)
    ranges = {
        name: quantize_range(*ends, bits[name]) for name, ends in network.ranges.items()
    }
    if not quantized:
        kernels = {name: k.dequantize() for name, k in network.kernels.items()}
        ranges = {}
    variables = {n: np.asarray(x) for n, x in network.variables.variables.items()}
    logits = translate(
        graph, traced, images, variables=variables, kernels=kernels, ranges=ranges
    )
    graph.output(logits, "logits")
    kind = onnx.TensorProto.UINT8 if options.pixels else onnx.TensorProto.FLOAT
    return graph.model(
        [helper.make_tensor_value_info("images", kind, shape)],
        [
            helper.make_tensor_value_info(
                "logits", onnx.TensorProto.FLOAT, ["batch", info.num_classes]
            )
        ],
        {METADATA_KEY: json.dumps(described(info, network.graph), sort_keys=True)},
    )
