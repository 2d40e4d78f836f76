"""Calibration: Q's ranges and biases from generated images, without training Q.

- The rounding of a kernel moves the mean of its operation's output. The mean error in
  each channel is measured on P's inputs of the operation, and half of it is moved into
  the bias or the batch norm's mean that follows (Nagel et al. 2019, arXiv 1906.04721;
  Banner et al. 2019, arXiv 1810.05723). Errors that quantized activations make are
  left: on generated images they are not those on real images.
- An activation gets the range of least error, see `quant.observed_range`. Q runs once
  through the network, so that a layer is calibrated behind those before it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax import quant
from adadfq_jax.game import players
from adadfq_jax.game.players import QOptions, Teacher
from adadfq_jax.models.convolution import convolve
from adadfq_jax.network import Graph, Hooks, Shift, find_shifts, kernels, run
from adadfq_jax.network.graph import Activation, Kernel
from adadfq_jax.quant import RangeState

_SHARE = 0.5  # part of the mean errors that is corrected, see docs/results/tried.md


class Found(NamedTuple):
    """What a batch of images says.

    Attributes:
      ranges: lo and hi of the activations, by name.
      errors: the part to correct of the mean error that the rounding of the kernel
        makes in each channel of the output, by the kernel's name.
    """

    ranges: dict[str, tuple[Array, Array]]
    errors: dict[str, Array]


def _channel_means(x: Array, axis: int) -> Array:
    others = tuple(i for i in range(x.ndim) if i != axis)
    return jnp.mean(x.astype(jnp.float32), others)


def measure(
    graph: Graph,
    options: QOptions,
    shifts: Mapping[str, Shift],
    teacher: Teacher,
    parameters: Mapping[str, Array],
    images: Array,
) -> Found:
    """Calibrate Q on one batch of images.

    Args:
      graph: the traced network.
      options: Q's options.
      shifts: the variables that shift kernels' outputs, see `network.find_shifts`.
      teacher: P.
      parameters: Q's parameters, by name.
      images: [B, H, W, C], in P's normalised space.
    """
    found = Found({}, {})

    def compare(
        entry: Kernel, output: Array, compute: Callable[[Array], Array]
    ) -> Array:
        if entry.name in shifts:
            gap = compute(quantized[entry.name]) - output
            error = _SHARE * _channel_means(gap, shifts[entry.name].axis)
            found.errors[entry.name] = error
        return output

    def correct(entry: Kernel, output: Array, _: Callable) -> Array:
        if entry.name not in shifts:
            return output
        axis = shifts[entry.name].axis
        others = [i for i in range(output.ndim) if i != axis]
        error = jnp.expand_dims(found.errors[entry.name], others)
        return output - error.astype(output.dtype)

    def activation(entry: Activation, x: Array) -> Array:
        bits = options.bits_of_activation(entry.name)
        assert bits is not None
        x = x.astype(jnp.float32)
        ends = quant.observed_range(x, bits, options.act_range)
        found.ranges[entry.name] = ends
        return quant.fake_quant(x, *ends, bits)

    variables = {**teacher.variables, **parameters}
    own = kernels(graph, variables)
    quantized = {
        entry.name: players.quantize_kernel(entry, own[entry.name], options, teacher)
        for entry in graph.kernels
    }
    run(graph, teacher.variables, images, Hooks(output=compare, convolution=convolve))
    hooks = Hooks(quantized, activation, output=correct, convolution=convolve)
    run(graph, variables, images, hooks)
    return found


def calibrate(
    graph: Graph,
    options: QOptions,
    teacher: Teacher,
    parameters: Mapping[str, Array],
    batches: Sequence[Array],
) -> tuple[dict[str, Array], dict[str, RangeState]]:
    """Calibrate Q on batches of images of equal size; ranges and errors are averaged.

    Args:
      graph: the traced network.
      options: Q's options.
      teacher: P.
      parameters: Q's parameters, by name.
      batches: the images, see `measure`.

    Returns:
      The variables in which Q differs from P, by name, and Q's activation ranges.
    """
    shifts = find_shifts(graph)
    # The graph and the shifts are no arrays, and the options are not hashable.
    one = jax.jit(lambda *args: measure(graph, options, shifts, *args))
    each = [one(teacher, parameters, images) for images in batches]
    found = jax.tree.map(lambda *values: sum(values) / len(values), *each)
    variables, changed = {**teacher.variables, **parameters}, dict(parameters)
    for name, error in found.errors.items():
        shift = shifts[name]
        old = variables[shift.variable]
        changed[shift.variable] = old - shift.sign * error.reshape(old.shape)
    ranges = {name: quant.fixed_range(*ends) for name, ends in found.ranges.items()}
    return changed, ranges
