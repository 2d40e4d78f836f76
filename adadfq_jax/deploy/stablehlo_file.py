"""Q as a StableHLO program, through `jax.export`: one file for CPU, CUDA and TPU.

The program runs without this package:

    jax.export.deserialize(open(file, 'rb').read()).call(images)

`deserialize(...).mlir_module()` gives it as text for other compilers. It takes batches
of any size. Kernels are constants of packed unsigned codes with 2, 4 or 8 bits each,
the first code in the lowest bits; the program unpacks them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax.deploy.codes import Kernel, pack_codes, storage_bits
from adadfq_jax.deploy.network import QuantizedNetwork
from adadfq_jax.evaluation.evaluator import normalise
from adadfq_jax.game import QOptions, players

PLATFORMS = ("cpu", "cuda", "tpu")


def unpack(packed: Array, shape: tuple[int, ...], width: int) -> Array:
    """Unpack the bytes of `pack_codes`, 2, 4 or 8 bits a code, into uint8 codes."""
    shifts = width * jnp.arange(8 // width, dtype=jnp.uint8)
    each = (packed[:, None] >> shifts[None]) & jnp.uint8(2**width - 1)
    return each.reshape(-1)[: math.prod(shape)].reshape(shape)


def _dequantized(kernel: Kernel) -> Array:
    """Compute the kernel's real values from a packed constant."""
    width = storage_bits(kernel.bits)
    packed = pack_codes(kernel.codes, width)
    codes = unpack(jnp.asarray(packed), kernel.codes.shape, width)
    zero_point, scale = (
        jnp.asarray(kernel.per_channel(values), jnp.float32)
        for values in (kernel.zero_point, kernel.scale)
    )
    return (codes.astype(jnp.float32) - zero_point) * scale


def to_stablehlo(
    network: QuantizedNetwork, *, pixels: bool, quantized: bool = True
) -> bytes:
    """Serialize the network as a program from images [B, H, W, C] to logits.

    Args:
      network: Q.
      pixels: whether the program takes uint8 pixels and normalises them; otherwise it
        takes float32 images in normalised space.
      quantized: whether kernels and activations are quantized; otherwise everything is
        in float32, as in P.
    """
    info, graph, variables = network.info, network.graph, network.variables

    def logits(images: Array) -> Array:
        kernels: dict[str, Any] = {
            name: _dequantized(kernel) if quantized else kernel.dequantize()
            for name, kernel in network.kernels.items()
        }
        if pixels:
            images = normalise(images, info.mean, info.std)
        options = network.options if quantized else QOptions(None, None)
        own = variables._replace(kernels=kernels)

        def one(image: Array) -> Array:
            return players.q_logits(graph, options, own, image[None])[0]

        with jax.default_matmul_precision("highest"):
            # A graph has a fixed batch size, so that vmap makes the open one.
            return jax.vmap(one)(images)

    (batch,) = jax.export.symbolic_shape("batch")
    dtype = np.uint8 if pixels else np.float32
    images = jax.ShapeDtypeStruct((batch, *info.image_shape), dtype)
    exported = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())
