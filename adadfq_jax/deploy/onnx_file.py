"""Q as an ONNX model, and the same network in float32 to compare it with."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper

from adadfq_jax.deploy.codes import quantize_range
from adadfq_jax.deploy.network import QuantizedNetwork, described
from adadfq_jax.deploy.onnx_graph import Graph, IntegerGraph, Tensor
from adadfq_jax.deploy.onnx_integer import Choices, IntegerNetwork
from adadfq_jax.deploy.onnx_rules import normalised, translate
from adadfq_jax.deploy.quantized_file import METADATA_KEY
from adadfq_jax.deploy.verify import export_errors


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """The user's choices for an ONNX file.

    Attributes:
      layout: of the images, 'NHWC' or 'NCHW'.
      pixels: whether the model takes uint8 pixels and normalises them; otherwise it
        takes float32 images in normalised space.
      least_bits: the narrowest type of codes: 8 for runtimes older than opset 21, 4 for
        those without UINT2.
    """

    layout: str = "NHWC"
    pixels: bool = False
    least_bits: int = 2

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
      ExportError: ONNX or ONNX Runtime refuses the model.
    """
    batch = network.graph.traced_batch
    graph = Graph(options.least_bits, batch, scalar_bounds=not quantized)
    kernels: dict[str, Any] = dict(network.kernels)
    bits = network.info.bits_by_name(network.graph)
    ranges = {
        name: quantize_range(*ends, bits[name]) for name, ends in network.ranges.items()
    }
    if not quantized:
        kernels = {name: k.dequantize() for name, k in network.kernels.items()}
        ranges = {}
    _, logits = _translated(graph, network, options, kernels, ranges)
    graph.output(logits, "logits")
    return _model(graph, network, options)


def _translated(
    graph: Graph,
    network: QuantizedNetwork,
    options: OnnxOptions,
    kernels: Mapping[str, Any],
    ranges: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Add the network to a graph; return the normalised images and the logits."""
    info, traced = network.info, network.graph
    order = (0, 3, 1, 2) if options.layout == "NCHW" else (0, 1, 2, 3)
    images = Tensor("images", (traced.traced_batch, *info.image_shape), order)
    if options.pixels:
        images = normalised(graph, images, info.mean, info.std, 3)
    if info.layout == "NCHW":  # the layout of the network, not of the file
        images = images.permuted((0, 3, 1, 2))
    variables = {n: np.asarray(x) for n, x in network.variables.variables.items()}
    logits = translate(
        graph, traced, images, variables=variables, kernels=kernels, ranges=ranges
    )
    return images, logits


def _model(
    graph: Graph,
    network: QuantizedNetwork,
    options: OnnxOptions,
    outputs: Sequence[str] = (),
) -> onnx.ModelProto:
    """Make the model of a graph; `outputs` are numbers beside the logits."""
    info, batch = network.info, "batch"
    height, width, channels = info.image_shape
    shape: list[int | str] = [batch, height, width, channels]
    if options.layout == "NCHW":
        shape = [batch, channels, height, width]
    of_float = onnx.TensorProto.FLOAT
    kind = onnx.TensorProto.UINT8 if options.pixels else of_float
    make = helper.make_tensor_value_info
    return graph.model(
        [make("images", kind, shape)],
        [
            make("logits", of_float, [batch, info.num_classes]),
            *(make(name, of_float, []) for name in outputs),
        ],
        {METADATA_KEY: json.dumps(described(info, network.graph), sort_keys=True)},
    )


_CALIBRATION_BATCH = 25


class IntegerModel(NamedTuple):
    """An integer file, see `onnx_integer`.

    Attributes:
      model: the file's content.
      rounded_again: number of the kernels' channels whose codes are not Q's.
    """

    model: onnx.ModelProto
    rounded_again: int


def to_integer_onnx(
    network: QuantizedNetwork,
    options: OnnxOptions,
    images: np.ndarray,
    choices: Choices | None = None,
) -> IntegerModel:
    """Convert the network to an ONNX model that runtimes compute in integers.

    Args:
      network: Q.
      options: see `OnnxOptions`; `least_bits` changes nothing.
      images: in normalised space, or pixels where the model takes them. They give the
        ranges of the tensors that Q does not quantize.
      choices: see `onnx_integer.Choices`.

    Raises:
      InputError: the network has an operation for which there is no rule.
      ExportError: ONNX or ONNX Runtime refuses the model.
    """
    graph = IntegerGraph(network.graph.traced_batch)
    image, logits = _translated(
        graph, network, options, network.kernels, network.ranges
    )
    made = IntegerNetwork(graph, image.name, logits.name, choices or Choices())
    pixels = _pixel_range(network)
    if pixels is not None and image.name in made.open:
        made.set_range(image.name, *pixels)
    if made.open:
        _measure(made, network, options, images)
    finished = made.graph()
    return IntegerModel(_model(finished, network, options), made.rounded_again)


def _pixel_range(network: QuantizedNetwork) -> tuple[float, float] | None:
    """Return the range of normalised images, or None if it is not known."""
    if not network.info.is_normalised:
        return None
    mean, std = np.asarray(network.mean), np.asarray(network.std)
    return float((-mean / std).min()), float(((1 - mean) / std).max())


def _measure(
    made: IntegerNetwork,
    network: QuantizedNetwork,
    options: OnnxOptions,
    images: np.ndarray,
) -> None:
    """Set the open ranges to the smallest and largest values on the images."""
    edges = made.open
    names = [f"{end}:{edge}" for edge in edges for end in ("low", "high")]
    model = _model(made.graph(measured=edges), network, options, names)
    import onnxruntime  # here: the other functions need onnx alone

    with export_errors():
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        found = np.asarray([
            session.run(names, {"images": options.images(images[at : at + size])})
            for size in [_CALIBRATION_BATCH]
            for at in range(0, len(images), size)
        ]).reshape(-1, len(edges), 2)  # fmt: skip
    for edge, low, high in zip(
        edges, found[..., 0].min(0), found[..., 1].max(0), strict=True
    ):
        made.set_range(edge, low, high)
