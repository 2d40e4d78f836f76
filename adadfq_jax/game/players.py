"""P and Q: two ways to run the same traced network.

P runs the network as it is and collects the moments of its batch norms' inputs. Q runs
it with quantized kernels and activations; while Q observes, its activation ranges move.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax import quant
from adadfq_jax.models.convolution import convolve
from adadfq_jax.network import Graph, Hooks, kernels, run
from adadfq_jax.network.graph import Activation, Kernel
from adadfq_jax.quant import RangeState

Convolution = Callable[..., Array] | None  # see `network.Hooks`


class QOptions(NamedTuple):
    """Options of Q's quantization and training.

    Attributes:
      weight_bits: bits of the kernels, None for kernels in float32.
      act_bits: bits of the activations, None for activations in float32.
      weight_range: how the range of a kernel's channel is chosen: 'minmax', or 'mse',
        see `quant.kernel_shrink`.
      act_range: how the range of a batch of activations is chosen, see
        `quant.observed_range`.
      range_ema: how the activation ranges are averaged, see `quant.read_range`.
      mask_gradient: whether activations beyond their range get no gradient.
      average: decay of the average of Q's parameters, 0 for no average.
      symmetric: whether kernels have symmetric ranges, see `quant.kernel_range`.
      layer_bits: bits of the kernels and activations that differ from the two numbers
        above, by name.
    """

    weight_bits: int | None
    act_bits: int | None
    weight_range: str = "minmax"
    act_range: str = "minmax"
    range_ema: str = "corrected"
    mask_gradient: bool = False
    average: float = 0.0
    symmetric: bool = False
    layer_bits: Mapping[str, int] = {}

    def bits_of_kernel(self, name: str) -> int | None:
        """Return the bits of a kernel, None for float32."""
        return self.weight_bits and self.layer_bits.get(name, self.weight_bits)

    def bits_of_activation(self, name: str) -> int | None:
        """Return the bits of an activation, None for float32."""
        return self.act_bits and self.layer_bits.get(name, self.act_bits)


class Teacher(NamedTuple):
    """P as the step needs it; it is the same at every step.

    Attributes:
      variables: the network's variables, by name.
      clip_ratios: factors that narrow the ranges of Q's kernels, by the kernels' names;
        see `with_clip_ratios`.
    """

    variables: Mapping[str, Array]
    clip_ratios: Mapping[str, Array]


class QVariables(NamedTuple):
    """The arrays that Q is evaluated with.

    Attributes:
      variables: the network's other variables that the logits need, by name.
      kernels: the quantized kernels, by name.
      ranges: the ranges of the activations, by name.
    """

    variables: Mapping[str, Array]
    kernels: Mapping[str, Array]
    ranges: Mapping[str, RangeState]


def moments(x: Array, axis: int = -1) -> dict[str, Array]:
    """Compute the 'mean' and biased 'var' of x over all axes but one, in float32.

    The mean is computed in a first pass, so that the variance loses no digits to
    cancellation.
    """
    x = x.astype(jnp.float32)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean = jnp.mean(x, others, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), others)
    return {"mean": mean.reshape(-1), "var": variance}


def p_logits(graph: Graph, variables: Mapping[str, Array], images: Array) -> Array:
    """Compute P's logits [B, classes], float32."""
    hooks = Hooks(convolution=convolve)
    return run(graph, variables, images, hooks)[0].astype(jnp.float32)


def p_forward(
    graph: Graph,
    variables: Mapping[str, Array],
    images: Array,
    convolution: Convolution = convolve,
) -> tuple[Array, dict[str, Any]]:
    """Compute P's logits and the `moments` of its batch norms' inputs, by name."""
    hooks = Hooks(
        batch_norm=lambda entry, x, *_: moments(x, entry.axis), convolution=convolution
    )
    logits, found = run(graph, variables, images, hooks)
    return logits.astype(jnp.float32), found


def with_clip_ratios(
    graph: Graph, variables: Mapping[str, Array], options: QOptions
) -> Teacher:
    """Return P's variables with the clip ratios of Q's kernels, chosen on P's kernels.

    The ratios stay the same for the whole game. If they were chosen again for every Q,
    they would jump wherever two ratios are equally good: two nearly equal kernels would
    be quantized so differently that averaging Q's weights would fail.
    """
    ratios = {}
    if options.weight_bits is not None and options.weight_range == "mse":
        own = jax.jit(kernels, static_argnums=0)(graph, variables)
        for entry in graph.kernels:
            bits = options.bits_of_kernel(entry.name)
            found = quant.kernel_shrink(
                own[entry.name], bits, entry.out_axes, options.symmetric
            )
            if found is not None:
                ratios[entry.name] = found
    return Teacher(variables, ratios)


def quantize_kernel(
    entry: Kernel, kernel: Array, options: QOptions, teacher: Teacher
) -> Array:
    """Fake-quantize a kernel of Q; in float32 Q's kernels stay as they are."""
    bits = options.bits_of_kernel(entry.name)
    if bits is None:
        return kernel
    ratio = teacher.clip_ratios.get(entry.name)
    return quant.fake_quant_kernel(
        kernel, bits, ratio, entry.out_axes, options.symmetric
    )


def quantize(
    graph: Graph,
    options: QOptions,
    teacher: Teacher,
    parameters: Mapping[str, Array],
    ranges: Mapping[str, RangeState],
) -> QVariables:
    """Make Q from P's variables and from parameters, which are P's own or trained.

    Args:
      graph: the traced network.
      options: Q's options.
      teacher: P.
      parameters: the values of `graph.parameters`, by name.
      ranges: the ranges of the activations, by name.
    """
    variables = {**teacher.variables, **parameters}
    own = kernels(graph, variables)
    quantized = {
        entry.name: quantize_kernel(entry, own[entry.name], options, teacher)
        for entry in graph.kernels
    }
    others = {name: variables[name] for name in graph.beside_kernels}
    return QVariables(others, quantized, ranges)


def q_logits(
    graph: Graph,
    options: QOptions,
    q: QVariables,
    images: Array,
    convolution: Convolution = convolve,
) -> Array:
    """Compute Q's logits [B, classes], float32, on unchanged ranges."""

    def activation(entry: Activation, x: Array) -> Array:
        return quantize_activation(entry, x, q.ranges[entry.name], options)

    hooks = Hooks(q.kernels, activation, convolution=convolution)
    return run(graph, q.variables, images, hooks)[0].astype(jnp.float32)


def quantize_activation(
    entry: Activation, x: Array, state: RangeState, options: QOptions
) -> Array:
    """Fake-quantize an activation of Q; in float32 Q's activations stay as they are."""
    bits = options.bits_of_activation(entry.name)
    if bits is None:
        return x
    x = x.astype(jnp.float32)  # the network may compute in bfloat16
    lo, hi = quant.read_range(state, options.range_ema)
    return quant.fake_quant(x, lo, hi, bits, masked=options.mask_gradient)


def q_observe(
    graph: Graph,
    options: QOptions,
    q: QVariables,
    images: Array,
    axis_name: str | None = None,
    convolution: Convolution = convolve,
) -> tuple[Array, dict[str, RangeState]]:
    """Move every activation range by the batch, then compute Q's logits on it.

    The ranges are those of the global batch, over the devices of `axis_name`.

    Returns:
      Q's logits [B, classes], float32, and the moved ranges by name.
    """
    moved: dict[str, RangeState] = {}

    def activation(entry: Activation, x: Array) -> Array:
        bits = options.bits_of_activation(entry.name)
        if bits is None:
            moved[entry.name] = q.ranges[entry.name]
            return x
        seen = jax.lax.stop_gradient(x).astype(jnp.float32)
        lo, hi = quant.observed_range(seen, bits, options.act_range, axis_name)
        state = quant.update_range(q.ranges[entry.name], lo, hi, options.range_ema)
        moved[entry.name] = state
        return quantize_activation(entry, x, state, options)

    hooks = Hooks(q.kernels, activation, convolution=convolution)
    logits, _ = run(graph, q.variables, images, hooks)
    return logits.astype(jnp.float32), moved


def init_ranges(graph: Graph) -> dict[str, RangeState]:
    """Return the activation ranges before any batch is observed."""
    return {entry.name: quant.init_range() for entry in graph.activations}
