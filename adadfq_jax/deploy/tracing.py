"""The network as a jaxpr, for translation: kernels are arguments, quantizers marked."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

from adadfq_jax import models, quant
from adadfq_jax.deploy.network import QuantizedNetwork, layer_bits
from adadfq_jax.evaluation.evaluator import normalise

# A call of this name with (x, lo, hi, bits) is an activation quantizer in a jaxpr.
QUANTIZER = quant.fake_quant.__name__
TRACED_BATCH = 2

_marked_fake_quant = jax.jit(quant.fake_quant)


class ActQuant(nn.Module):
    """That of `layers` with a frozen range, as one call that a translator finds.

    It has the same name, by which Flax names those that the network does not.
    """

    bits: int
    layer_bits: Mapping[str, int]

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        bits = self.layer_bits.get(".".join(self.path), self.bits)
        state = self.variable("ranges", "range", quant.init_range)
        lo, hi = quant.read_range(quant.RangeState(*state.value), "corrected")
        return _marked_fake_quant(x, lo, hi, bits)


def logits_function(
    network: QuantizedNetwork, *, act_quant: Callable[..., nn.Module], pixels: bool
) -> Callable[[dict[str, Any], Any], Any]:
    """Makes f(kernels by name, images) -> logits [B, num_classes].

    Args:
      network: Q; its biases, batch norms and ranges are constants of f.
      act_quant: makes the activation quantizers, see `models.get_model`.
      pixels: whether images are uint8 pixels [B, H, W, C], normalised inside, or
        float32 in normalised space.
    """
    info = network.info
    model = network.module.copy(act_quant=act_quant)
    flat = flax.traverse_util.flatten_dict(dict(network.variables))
    names = {name: ("params", *name.split(".")) for name in network.kernels}

    def logits(kernels: dict[str, Any], images: Any) -> Any:
        leaves = {**flat, **{path: kernels[name] for name, path in names.items()}}
        if pixels:
            images = normalise(images, info.mean, info.std)
        return model.apply(flax.traverse_util.unflatten_dict(leaves), images)

    return logits


def image_type(
    network: QuantizedNetwork, batch: Any, pixels: bool
) -> jax.ShapeDtypeStruct:
    """Shape and type of a batch of images."""
    dtype = np.uint8 if pixels else np.float32
    return jax.ShapeDtypeStruct((batch, *network.info.image_shape), dtype)


def trace(
    network: QuantizedNetwork, *, quantized: bool, pixels: bool
) -> tuple[ClosedJaxpr, list[str]]:
    """The jaxpr of `logits_function` at `TRACED_BATCH` images, and its kernels' names.

    Its arguments are the kernels in the order of the names, then the images.

    Args:
      network: Q.
      quantized: with activation quantizers, marked as calls of `QUANTIZER`, or, for
        the same network in float32, without.
      pixels: see `logits_function`.
    """
    of_layers = layer_bits(network.info, network.module)

    def act_quant(name: str | None = None) -> nn.Module:
        if quantized:
            return ActQuant(network.info.act_bits, of_layers, name=name)
        return models.Identity(name=name)

    function = logits_function(network, act_quant=act_quant, pixels=pixels)
    names = sorted(network.kernels)
    kernels = {
        name: jax.ShapeDtypeStruct(kernel.codes.shape, np.float32)
        for name, kernel in network.kernels.items()
    }
    images = image_type(network, TRACED_BATCH, pixels)
    return jax.make_jaxpr(function)(kernels, images), names
