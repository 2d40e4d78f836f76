"""The quantized network Q: its description, its graph, and Q as a callable."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import models, settings
from adadfq_jax.deploy.codes import Kernel
from adadfq_jax.errors import InputError
from adadfq_jax.game import QOptions, QVariables, layer_bits, players
from adadfq_jax.network import Function, Graph, trace
from adadfq_jax.runtime import files
from adadfq_jax.teacher import package_function


@dataclasses.dataclass(frozen=True)
class NetworkInfo:
    """The description that rebuilds Q, together with its tensors.

    Attributes:
      model: the network's name.
      num_classes: length of the logits.
      image_shape: (H, W, channels).
      mean: per channel, for pixels in [0, 1].
      std: likewise.
      weight_bits: of the kernels.
      act_bits: of the activations.
      first_last_bits: of the first and the last layer, see `layer_bits.resolve`; 0
        means the bits of all other layers.
      places: where activations are quantized, see `network.trace`.
      layout: of the images that the original network takes; Q always takes NHWC.
      layer_bits: bits of the kernels and activations that have others, as pairs (name,
        bits); () where `first_last_bits` says which have others.
    """

    model: str
    num_classes: int
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weight_bits: int
    act_bits: int
    first_last_bits: int = 0
    places: str = "nonlinearities"
    layout: str = "NHWC"
    layer_bits: tuple[tuple[str, int], ...] = ()

    @property
    def is_normalised(self) -> bool:
        """Whether P's normalisation was given; if not, mean is 0 and std is 1."""
        return any(self.mean) or set(self.std) != {1.0}

    @property
    def bits(self) -> str:
        """The label of the bits, see `settings.bits_label`."""
        return settings.bits_label(
            *(self.weight_bits, self.act_bits, self.first_last_bits, self.places),
            self.layer_bits,
        )

    def other_bits(self, graph: Graph) -> dict[str, int]:
        """Return the bits of the kernels and activations that have others, by name."""
        if self.layer_bits:
            return dict(self.layer_bits)
        numbers = (self.weight_bits, self.act_bits, self.first_last_bits)
        return layer_bits.resolve(graph, *numbers).bits

    def mixed(self, bits: Mapping[str, int]) -> "NetworkInfo":
        """Return the description with bits by name in place of `first_last_bits`."""
        own = tuple(sorted(bits.items()))
        return dataclasses.replace(self, first_last_bits=0, layer_bits=own)

    def bits_in_words(self, graph: Graph) -> str:
        """List the layers that have other bits, see `layer_bits.in_words`."""
        own = self.other_bits(graph)
        return layer_bits.in_words(graph, self.weight_bits, self.act_bits, own)

    def bits_by_name(self, graph: Graph) -> dict[str, int]:
        """Return the bits of every kernel and every activation."""
        return {
            **{entry.name: self.weight_bits for entry in graph.kernels},
            **{entry.name: self.act_bits for entry in graph.activations},
            **self.other_bits(graph),
        }

    def options(self, graph: Graph, **others: Any) -> QOptions:
        """Return the options that quantize Q; for `others` see `game.QOptions`."""
        own = self.other_bits(graph)
        return QOptions(self.weight_bits, self.act_bits, layer_bits=own, **others)


def function_of(info: NetworkInfo) -> Function:
    """Return the network of the package that the info names."""
    return package_function(info.model, info.num_classes, info.image_shape)


def is_of_package(info: NetworkInfo, function: Function) -> bool:
    """Tell whether a function is the network of this package that the info names."""
    known = info.model in models.names()
    return known and function.apply is function_of(info).apply


@functools.lru_cache(maxsize=32)
def _package_graph(info: NetworkInfo, dtype: Any) -> Graph:
    return _traced(info, function_of(info), dtype)


def _traced(info: NetworkInfo, function: Function, dtype: Any) -> Graph:
    return trace(
        function.apply,
        function.of_shapes().variables,
        image_shape=info.image_shape,
        layout=info.layout,
        places=info.places,
        parameters=function.parameters,
        dtype=dtype,
    )


def graph_of(
    info: NetworkInfo, function: Function | None = None, dtype: Any = np.float32
) -> Graph:
    """Return the graph of a network.

    Args:
      info: the network's description.
      function: the network; None means the package's network that the info names.
      dtype: of the images.

    Raises:
      InputError: the network cannot be quantized, or the number of its logits is not
        `info.num_classes`.
    """
    if function is None or is_of_package(info, function):
        graph = _package_graph(info, np.dtype(dtype))
    else:
        graph = _traced(info, function, dtype)
    if graph.num_classes != info.num_classes:
        raise InputError(
            f"num_classes={info.num_classes}: {info.model} gives {graph.num_classes}"
            " logits for an image",
            "num_classes",
        )
    return graph


def described(info: NetworkInfo, graph: Graph) -> dict[str, Any]:
    """Return the info as JSON values, for the metadata of files."""
    return {**dataclasses.asdict(info), "layer_bits": info.other_bits(graph)}


# One program for all networks that differ in their arrays alone.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    graph: Graph, info: NetworkInfo, variables: QVariables, images: jax.Array
) -> jax.Array:
    return players.q_logits(graph, info.options(graph), variables, images)


@dataclasses.dataclass(frozen=True)
class QuantizedNetwork:
    """Q, a function of images.

    Attributes:
      info: the network's description.
      function: the original network, with shapes for variables.
      graph: its graph.
      variables: Q's variables, with dequantized kernels.
      kernels: the kernels as codes, by name.
      ranges: lo and hi of the activations, by name.
      path: Q's file, or None where there is none.
    """

    info: NetworkInfo
    function: Function
    graph: Graph
    variables: QVariables
    kernels: Mapping[str, Kernel]
    ranges: Mapping[str, tuple[float, float]]
    path: Path | None = None

    @property
    def weight_bits(self) -> int:
        """Bits of every kernel, except as `info.other_bits` says."""
        return self.info.weight_bits

    @property
    def act_bits(self) -> int:
        """Bits of every activation, except as `info.other_bits` says."""
        return self.info.act_bits

    @property
    def num_classes(self) -> int:
        """Length of the logits."""
        return self.info.num_classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape (H, W, channels) of an image."""
        return self.info.image_shape

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean per channel; the network takes (pixels / 255 - mean) / std."""
        return self.info.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation per channel, see `mean`."""
        return self.info.std

    def save(self, path: str | Path) -> Path:
        """Write `quantized.safetensors`, completely or not at all.

        Args:
          path: the file to write.

        Returns:
          The path.

        Raises:
          OSError: the file cannot be written.
        """
        from adadfq_jax.deploy import quantized_file  # here: it imports this module

        path = Path(path).expanduser()
        files.write_bytes(path, quantized_file.to_bytes(self))
        return path

    def export(
        self, folder: str | Path, images: np.ndarray | None = None, **options: Any
    ) -> dict[str, Any]:
        """Write the network's file and its ONNX and StableHLO forms, each checked.

        Args:
          folder: gets quantized.safetensors, quantized.onnx, quantized.integer.onnx,
            quantized.stablehlo, encodings.json, export.json and model_card.md, and
            quantized.tflite for target='litert'; it is made if it does not exist.
          images: normalised images [N, H, W, C] that give the integer file the ranges
            of the tensors that Q leaves in float; None means random images.
          **options: see `settings.Export`.

        Returns:
          The contents of export.json.

        Raises:
          InputError: an option does not exist or has a wrong value, or the network
            has an operation without an ONNX rule.
          ExportError: a file does not compute what this network does. After an error
            the folder's files are as they were.
        """
        from adadfq_jax.deploy import export  # here: it imports this module

        chosen = settings.section("export", options)
        if not (chosen.onnx or chosen.stablehlo):
            raise InputError("onnx=False, stablehlo=False: nothing to export")
        settings.check_target(chosen)
        return export.export_network(self, Path(folder).expanduser(), chosen, images)

    @functools.cached_property
    def options(self) -> QOptions:
        """The options that quantize Q."""
        return self.info.options(self.graph)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits [B, classes] of normalised images [B, H, W, C].

        Raises:
          InputError: the images have another shape, or are integer pixels.
        """
        images = jnp.asarray(images)
        shape, pixels = images.shape, not jnp.issubdtype(images.dtype, jnp.floating)
        if shape[1:] != self.image_shape or pixels:
            raise InputError(
                f"images: {images.dtype} {shape}; the network takes normalised images"
                f" (x / 255 - mean) / std, float [B, *{self.image_shape}]"
            )
        with jax.default_matmul_precision("highest"):
            return _logits(self.graph, self.info, self.variables, images)
