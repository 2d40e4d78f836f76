"""Calibration: Q's biases from generated images, without training Q.

The rounding of a kernel moves the mean of its operation's output. The mean error in
each channel is measured on P's inputs of the operation, and half of it is moved into
the bias or the batch norm's mean that follows (Nagel et al. 2019, arXiv 1906.04721;
Banner et al. 2019, arXiv 1810.05723). Errors that quantized activations make are left:
on generated images they are not those on real images. The ranges of the activations
are those that the game has observed.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax.game import players
from adadfq_jax.game.players import QOptions, Teacher
from adadfq_jax.models.convolution import convolve
from adadfq_jax.network import Graph, Hooks, Shift, find_shifts, kernels, run
from adadfq_jax.network.graph import Kernel

_SHARE = 0.5  # part of the mean errors that is corrected, see docs/results/tried.md


def _channel_means(x: Array, axis: int) -> Array:
    others = tuple(i for i in range(x.ndim) if i != axis)
    return jnp.mean(x.astype(jnp.float32), others)


def mean_errors(
    graph: Graph,
    options: QOptions,
    shifts: Mapping[str, Shift],
    teacher: Teacher,
    images: Array,
) -> dict[str, Array]:
    """Return the mean error of the output by the rounding of the kernel, by its name.

    Args:
      graph: the traced network.
      options: Q's options.
      shifts: the variables that shift kernels' outputs, see `network.find_shifts`.
      teacher: P.
      images: [B, H, W, C], in P's normalised space.

    Returns:
      Error of each channel of the outputs that have a shift.
    """
    found: dict[str, Array] = {}
    own = kernels(graph, teacher.variables)

    def compare(
        entry: Kernel, output: Array, compute: Callable[[Array], Array]
    ) -> Array:
        if entry.name in shifts:
            kernel = players.quantize_kernel(entry, own[entry.name], options, teacher)
            gap = compute(kernel) - output
            found[entry.name] = _channel_means(gap, shifts[entry.name].axis)
        return output

    run(graph, teacher.variables, images, Hooks(output=compare, convolution=convolve))
    return found


def calibrate(
    graph: Graph, options: QOptions, teacher: Teacher, batches: Sequence[Array]
) -> dict[str, Array]:
    """Correct Q's biases on batches of images of equal size.

    Args:
      graph: the traced network.
      options: Q's options.
      teacher: P, whose kernels Q has.
      batches: the images, see `mean_errors`.

    Returns:
      The variables in which Q differs from P, by name.
    """
    shifts = find_shifts(graph)
    # The graph and the shifts are no arrays, and the options are not hashable.
    one = jax.jit(lambda *args: mean_errors(graph, options, shifts, *args))
    each = [one(teacher, images) for images in batches]
    errors = jax.tree.map(lambda *values: sum(values) / len(values), *each)
    changed = {}
    for name, error in errors.items():
        shift = shifts[name]
        old = teacher.variables[shift.variable]
        moved = shift.sign * _SHARE * error.reshape(old.shape)
        changed[shift.variable] = old - moved
    return changed
