"""The quantized network Q: what it is, its module, and how it is called."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adadfq_jax import models, settings
from adadfq_jax.deploy.codes import Kernel
from adadfq_jax.errors import InputError
from adadfq_jax.models.layers import ActQuant, Identity
from adadfq_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class NetworkInfo:
    """What is needed beside the tensors to rebuild Q and to feed it.

    image_shape: (H, W, channels). mean, std: per channel, for pixels in [0, 1].
    first_last_bits: of the first and the last layer, see `layer_bits`; 0 for those of
    all others.
    """

    model: str
    num_classes: int
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weight_bits: int
    act_bits: int
    first_last_bits: int = 0

    @property
    def bits(self) -> str:
        """'W4A4', or 'W4A4 first/last 8'."""
        return settings.bits_label(
            self.weight_bits, self.act_bits, self.first_last_bits
        )


def layer_bits(info: NetworkInfo, model: nn.Module | None = None) -> dict[str, int]:
    """Bits of the layers that have their own, by name of kernel or quantizer.

    Those are the first and the last kernel, and the quantizer before the last.

    Args:
      info: of the network.
      model: its module; None is the one that is known by its name.
    """
    if not info.first_last_bits:
        return {}
    if model is None:
        model = models.get_model(info.model, num_classes=info.num_classes)
    names = models.first_and_last(model, info.image_shape)
    return dict.fromkeys(names, info.first_last_bits)


def described(info: NetworkInfo, model: nn.Module | None = None) -> dict[str, Any]:
    """The info as JSON values, for the metadata of files; model: see `layer_bits`."""
    values = dataclasses.asdict(info)
    if info.first_last_bits:
        return {**values, "layer_bits": layer_bits(info, model)}
    del values["first_last_bits"]  # a file without the option has the bytes it had
    return values


@dataclasses.dataclass(frozen=True)
class QuantizedNetwork:
    """Q rebuilt from a file: a function of images.

    info: what the network is. module: Q's. variables: for its `apply`,
    kernels dequantized. kernels: those as codes, by their names in the file. ranges: lo
    and hi of the activations, by quantizer. path: of the file, if there still is one.
    """

    info: NetworkInfo
    module: nn.Module
    variables: Mapping[str, Any]
    kernels: Mapping[str, Kernel]
    ranges: Mapping[str, tuple[float, float]]
    path: Path | None = None

    @property
    def weight_bits(self) -> int:
        """Bits of every kernel, but see `info.first_last_bits`."""
        return self.info.weight_bits

    @property
    def act_bits(self) -> int:
        """Bits of every activation, but see `info.first_last_bits`."""
        return self.info.act_bits

    @property
    def num_classes(self) -> int:
        """Length of the logits."""
        return self.info.num_classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, channels)."""
        return self.info.image_shape

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel; the network takes (pixels / 255 - mean) / std."""
        return self.info.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, see `mean`."""
        return self.info.std

    def save(self, path: str | Path) -> Path:
        """Writes `quantized.safetensors`, whole or not at all.

        Args:
          path: the file to write.

        Raises:
          OSError: it cannot be written.
        """
        from adadfq_jax.deploy import quantized_file  # which imports this module

        files.write_bytes(Path(path), quantized_file.to_bytes(self))
        return Path(path)

    def export(self, folder: str | Path, **options: Any) -> dict[str, Any]:
        """Writes the network's file and its ONNX and StableHLO forms, each checked.

        Args:
          folder: gets quantized.safetensors, quantized.onnx, quantized.stablehlo,
            export.json and model_card.md; it is made if it is not there.
          **options: see `deploy.export.Options`.

        Returns:
          The contents of export.json.

        Raises:
          InputError: the network has an operation that ONNX lacks a rule for here.
          ExportError: a file does not compute what this network does.
        """
        from adadfq_jax.deploy import export  # which imports this module

        return export.export_network(self, Path(folder), export.Options(**options))

    @functools.cached_property
    def _apply(self):
        return jax.jit(self.module.apply)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [B, classes] of images [B, H, W, C] in normalised space.

        Raises:
          InputError: the images are of another shape, or pixels.
        """
        images = jnp.asarray(images)
        shape, pixels = images.shape, not jnp.issubdtype(images.dtype, jnp.floating)
        if shape[1:] != self.image_shape or pixels:
            raise InputError(
                f"images: {images.dtype} {shape}; the network takes normalised images"
                f" (x / 255 - mean) / std, float [B, *{self.image_shape}]"
            )
        with jax.default_matmul_precision("highest"):
            return self._apply(self.variables, images)


def teacher_module(info: NetworkInfo, model: nn.Module | None = None) -> nn.Module:
    """The Linen module of P: without activation quantizers.

    Args:
      info: of the network.
      model: the one from outside the package; None is the one known by its name.
    """
    if model is None:
        return models.get_model(info.model, num_classes=info.num_classes)
    return model.copy(act_quant=Identity)


def make_student(info: NetworkInfo, model: nn.Module | None = None, **act_quant: Any):
    """The Linen module of Q; keywords go to its activation quantizers.

    Args:
      info: of the network.
      model: its module as P; None is the one that is known by its name.
      **act_quant: see `layers.ActQuant`.
    """
    if model is None:
        model = models.get_model(info.model, num_classes=info.num_classes)
    bits = layer_bits(info, model)
    return model.copy(
        act_quant=functools.partial(
            ActQuant, bits=info.act_bits, layer_bits=bits, **act_quant
        )
    )
