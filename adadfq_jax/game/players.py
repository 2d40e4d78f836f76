"""P and Q, the two readings of one traced network.

P is a run that collects the moments of its batch norms' inputs. Q is a run with
quantized kernels and activations; while it observes, its activation ranges move.
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

    weight_bits: bits of the kernels, None for kernels in float32.
    act_bits: bits of the activations, None likewise.
    weight_range: of a kernel's channel, 'minmax' or 'mse', see `quant.kernel_shrink`.
    act_range: of a batch of activations, see `quant.observed_range`.
    range_ema: how the activation ranges are read, see `quant.read_range`.
    mask_gradient: no gradient to activations beyond their range.
    learn_ranges: whether the activation ranges train with Q's parameters.
    average: decay of the average of Q's parameters, 0 for none.
    layer_bits: of the kernels and activations that have others, by name.
    """

    weight_bits: int | None
    act_bits: int | None
    weight_range: str = "minmax"
    act_range: str = "minmax"
    range_ema: str = "corrected"
    mask_gradient: bool = False
    learn_ranges: bool = False
    average: float = 0.0
    layer_bits: Mapping[str, int] = {}

    def bits_of_kernel(self, name: str) -> int | None:
        """Bits of a kernel, None for float32."""
        return self.weight_bits and self.layer_bits.get(name, self.weight_bits)

    def bits_of_activation(self, name: str) -> int | None:
        """Bits of an activation, None for float32."""
        return self.act_bits and self.layer_bits.get(name, self.act_bits)


class Teacher(NamedTuple):
    """P as the step needs it, the same at every step.

    variables: of the network, by name.
    clip_ratios: factors that narrow the ranges of Q's kernels, by the kernels' names;
    see `with_clip_ratios`.
    """

    variables: Mapping[str, Array]
    clip_ratios: Mapping[str, Array]


class QVariables(NamedTuple):
    """What Q is evaluated with.

    variables: of the network that are needed beside the kernels, by name.
    kernels: quantized, by name.
    ranges: of the activations, by name.
    """

    variables: Mapping[str, Array]
    kernels: Mapping[str, Array]
    ranges: Mapping[str, RangeState]


def moments(x: Array, axis: int = -1) -> dict[str, Array]:
    """'mean' and biased 'var' of x per entry of an axis, over all others; in float32.

    Two passes (the mean first), so that nothing cancels.
    """
    x = x.astype(jnp.float32)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean = jnp.mean(x, others, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), others)
    return {"mean": mean.reshape(-1), "var": variance}


def p_logits(graph: Graph, variables: Mapping[str, Array], images: Array) -> Array:
    """P's logits [B, classes], float32."""
    hooks = Hooks(convolution=convolve)
    return run(graph, variables, images, hooks)[0].astype(jnp.float32)


def p_forward(
    graph: Graph,
    variables: Mapping[str, Array],
    images: Array,
    convolution: Convolution = convolve,
) -> tuple[Array, dict[str, Any]]:
    """P's logits, and the `moments` of its batch norms' inputs by their names."""
    hooks = Hooks(
        batch_norm=lambda entry, x, *_: moments(x, entry.axis), convolution=convolution
    )
    logits, found = run(graph, variables, images, hooks)
    return logits.astype(jnp.float32), found


def with_clip_ratios(
    graph: Graph, variables: Mapping[str, Array], options: QOptions
) -> Teacher:
    """P's variables with the clip ratios of Q's kernels, chosen on P's.

    They are the same for the whole game. Chosen anew for every Q they would jump: where
    two are as good, kernels that differ by a thousandth are quantized so differently
    that an average of Q's weights lost 26 points against the weights themselves.
    """
    ratios = {}
    if options.weight_bits is not None and options.weight_range == "mse":
        own = jax.jit(kernels, static_argnums=0)(graph, variables)
        for entry in graph.kernels:
            bits = options.bits_of_kernel(entry.name)
            found = quant.kernel_shrink(own[entry.name], bits, entry.out_axes)
            if found is not None:
                ratios[entry.name] = found
    return Teacher(variables, ratios)


def quantize_kernel(
    entry: Kernel, kernel: Array, options: QOptions, teacher: Teacher
) -> Array:
    """A kernel of Q on its own grid; as it is where kernels are in float32."""
    bits = options.bits_of_kernel(entry.name)
    if bits is None:
        return kernel
    ratio = teacher.clip_ratios.get(entry.name)
    return quant.fake_quant_kernel(kernel, bits, ratio, entry.out_axes)


def quantize(
    graph: Graph,
    options: QOptions,
    teacher: Teacher,
    parameters: Mapping[str, Array],
    ranges: Mapping[str, RangeState],
) -> QVariables:
    """Q, of parameters that are P's or trained.

    Args:
      graph: of the network.
      options: of Q.
      teacher: P.
      parameters: those of `graph.parameters`, by name.
      ranges: of the activations.
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
    """Q's logits [B, classes], float32, with the ranges as they are."""

    def activation(entry: Activation, x: Array) -> Array:
        return quantize_activation(entry, x, q.ranges[entry.name], options)

    hooks = Hooks(q.kernels, activation, convolution=convolution)
    return run(graph, q.variables, images, hooks)[0].astype(jnp.float32)


def quantize_activation(
    entry: Activation, x: Array, state: RangeState, options: QOptions
) -> Array:
    """An activation of Q on its range; as it is where activations are in float32."""
    bits = options.bits_of_activation(entry.name)
    if bits is None:
        return x
    x = x.astype(jnp.float32)  # of a network that computes in bfloat16
    lo, hi = quant.read_range(state, options.range_ema)
    masked, learned = options.mask_gradient, options.learn_ranges
    return quant.fake_quant(x, lo, hi, bits, masked=masked, learned=learned)


def q_observe(
    graph: Graph,
    options: QOptions,
    q: QVariables,
    images: Array,
    axis_name: str | None = None,
    convolution: Convolution = convolve,
) -> tuple[Array, dict[str, RangeState]]:
    """Q's logits where every range is first moved by the batch, and those ranges.

    The batch is the global one: a minimum is that over `axis_name` too.
    """
    moved: dict[str, RangeState] = {}

    def activation(entry: Activation, x: Array) -> Array:
        bits = options.bits_of_activation(entry.name)
        if bits is None:
            moved[entry.name] = q.ranges[entry.name]
            return x
        seen = jax.lax.stop_gradient(x).astype(jnp.float32)
        lo, hi = quant.observed_range(seen, bits, options.act_range)
        if axis_name is not None:
            lo, hi = jax.lax.pmin(lo, axis_name), jax.lax.pmax(hi, axis_name)
        state = quant.update_range(q.ranges[entry.name], lo, hi, options.range_ema)
        moved[entry.name] = state
        return quantize_activation(entry, x, state, options)

    hooks = Hooks(q.kernels, activation, convolution=convolution)
    logits, _ = run(graph, q.variables, images, hooks)
    return logits.astype(jnp.float32), moved


def init_ranges(graph: Graph) -> dict[str, RangeState]:
    """Ranges that have seen nothing."""
    return {entry.name: quant.init_range() for entry in graph.activations}


def first_and_last(graph: Graph, bits: int) -> dict[str, int]:
    """Bits of the first and the last kernel and of the activation before the last.

    {} for bits of 0. The first kernel's activation are the images.
    """
    if not bits:
        return {}
    first, last = graph.kernels[0], graph.kernels[-1]
    names = [first.name, last.name, last.activation]
    return dict.fromkeys([name for name in names if name], bits)
