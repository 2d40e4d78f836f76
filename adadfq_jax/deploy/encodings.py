"""Q for other tools: its scales as JSON, its weights as a state dict."""

from typing import Any

import numpy as np
import safetensors.numpy

from adadfq_jax import teacher
from adadfq_jax.deploy.codes import quantize_range
from adadfq_jax.deploy.network import (
    NetworkInfo,
    QuantizedNetwork,
    function_of,
    is_of_package,
)
from adadfq_jax.errors import InputError, short
from adadfq_jax.network import Function, tree_of


def encodings(network: QuantizedNetwork) -> dict[str, Any]:
    """Return how kernels and activations are quantized, as JSON values.

    A code u in [0, 2^bits - 1] stands for (u - zero_point) * scale. Kernels have lists,
    with a number for each output channel. `min` and `max` are the values of the codes 0
    and 2^bits - 1.
    """
    kernels, activations = {}, {}
    for name, kernel in network.kernels.items():
        scale, zero_point = (
            np.asarray(x, np.float64) for x in (kernel.scale, kernel.zero_point)
        )
        top = 2**kernel.bits - 1
        kernels[name] = {
            "bits": kernel.bits,
            "scale": scale.tolist(),
            "zero_point": zero_point.astype(int).tolist(),
            "min": (-zero_point * scale).tolist(),
            "max": ((top - zero_point) * scale).tolist(),
        }
    bits_of = network.info.bits_by_name(network.graph)
    for name, ends in network.ranges.items():
        step, point, offset, bits = quantize_range(*ends, bits_of[name])
        low = float(-point * step + offset)
        activations[name] = {
            "bits": bits,
            "scale": float(step),
            "zero_point": round(-low / float(step)),
            "min": low,
            "max": low + (2**bits - 1) * float(step),
        }
    return {"kernels": kernels, "activations": activations}


def check_scheme(info: NetworkInfo, function: Function, scheme: str) -> None:
    """Refuse a naming scheme of a state dict that a network does not have.

    Raises:
      InputError: the network is not of the package, or has no such scheme.
    """
    if not is_of_package(info, function):
        raise InputError(
            f"export.state_dict={short(scheme)}: {info.model} is no network of this"
            " package, so that its state dict is not known; leave it empty"
        )
    known = teacher.schemes(info.model)
    if scheme not in known:
        raise InputError(
            f"export.state_dict={short(scheme)}: {info.model} has the names"
            f" {', '.join(known)}"
        )


def state_dict(network: QuantizedNetwork, scheme: str) -> bytes:
    """Return Q's weights in float32, on their grids, as the content of a safetensors.

    Args:
      network: Q, a network of the package.
      scheme: the names of the weights, such as 'torchvision', as `inspect` prints.

    Raises:
      InputError: see `check_scheme`.
    """
    check_scheme(network.info, network.function, scheme)
    values = {**network.variables.variables, **network.variables.kernels}
    leaves = {name: np.asarray(value) for name, value in values.items()}
    tree = tree_of(leaves, function_of(network.info).paths or {})
    arrays = teacher.to_state_dict(tree, network.info.model, scheme)
    return safetensors.numpy.save(arrays)
