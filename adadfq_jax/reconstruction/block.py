"""One block of Q, which learns to compute what P's block computes.

The block's kernels learn their rounding and scales, and its activations their ranges.
The block's input is Q's as well as P's, so that it learns to correct the errors of the
blocks before it (BRECQ, arXiv 2102.05426; QDrop, arXiv 2203.05740; GENIE-M, arXiv
2212.04780):

    loss = mean |q - y|^2 / mean |y|^2 + weight * penalty of V

y is the output of P's block for P's input. q is the output of Q's block for an input
whose values are each Q's or P's with equal probability. Likewise, each value of an
activation is quantized or left as it is. The penalty starts after a part of the
iterations.

All functions take arrays in the order of the block's kernels and activations, so that
blocks of the same structure share a compiled program.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adadfq_jax import quant
from adadfq_jax.game import collectives, first_bad
from adadfq_jax.game.players import QOptions
from adadfq_jax.models.convolution import convolve
from adadfq_jax.network import Graph, Hooks, block_variables, run_block
from adadfq_jax.network.graph import Activation
from adadfq_jax.reconstruction import rounding
from adadfq_jax.reconstruction.rounding import KernelGrid

_FIRST_POWER, _LAST_POWER = 20.0, 2.0  # powers in the penalty, first and last
_PENALTY_FREE = 0.2  # part of the iterations without the penalty


class Options(NamedTuple):
    """Options of the reconstruction of a block.

    Attributes:
      iterations: number of iterations for a block.
      batch_size: images in an iteration, over all devices.
      rate: rate of Adam on V.
      factor_rate: rate of Adam on the logarithms of scales and ranges; it falls to 0
        as a cosine.
      penalty: weight of the penalty.
    """

    iterations: int
    batch_size: int
    rate: float
    factor_rate: float
    penalty: float


class Learned(NamedTuple):
    """The trained values of a block, in the order of its kernels and activations.

    Attributes:
      rounding: V, in the kernels' shapes.
      scales: logarithms of f, [out] in the kernels' rank.
      ranges: logarithms of the factors of the activations' scales, scalars.
    """

    rounding: tuple[Array, ...]
    scales: tuple[Array, ...]
    ranges: tuple[Array, ...]


class Fixed(NamedTuple):
    """The values of a block that do not train.

    Attributes:
      grids: the grids of the kernels.
      ranges: the initial ranges (lo, hi) of the activations.
      variables: Q's other variables that the block reads.
      mean_square: mean square of the outputs of P's block, over all images.
      first_step: the step at which the block's iterations begin.
    """

    grids: tuple[KernelGrid, ...]
    ranges: tuple[tuple[Array, Array], ...]
    variables: tuple[Array, ...]
    mean_square: Array
    first_step: Array


class State(NamedTuple):
    """The state of a block's training.

    Attributes:
      step: number of steps of the run so far.
      first_bad_step: the first step that made a number that is not finite, -1 if none.
      learned: the trained values.
      moments: the state of Adam.
    """

    step: Array
    first_bad_step: Array
    learned: Learned
    moments: Any


class Images(NamedTuple):
    """A block's inputs and P's outputs for the images it learns from, each [N, ...].

    Attributes:
      p_input: the input of P's block.
      q_input: the input of Q's block.
      p_output: the output of P's block.
    """

    p_input: Array
    q_input: Array
    p_output: Array


_ADAM = optax.scale_by_adam()


def start(learned: Learned, step: int) -> State:
    """Make the state of a block's training before its first iteration."""
    return State(
        step=jnp.full((), step, jnp.int32),
        first_bad_step=jnp.full((), -1, jnp.int32),
        learned=learned,
        moments=_ADAM.init(learned),
    )


class Block:
    """A block of a graph as functions of arrays.

    Args:
      graph: Q's graph.
      index: the block's index in `graph.blocks`.
      q_options: Q's options.
      options: options of the reconstruction.
      axis_name: mapped axis over which a batch is split, or None.
    """

    def __init__(
        self,
        graph: Graph,
        index: int,
        q_options: QOptions,
        options: Options,
        axis_name: str | None = None,
    ):
        block = graph.blocks[index]
        entries = {entry.name: entry for entry in graph.kernels}
        self.name = block.name
        self.kernels = [entries[name] for name in block.kernels]
        self.activations = block.activations
        self.variables = block_variables(graph, index)
        self._graph, self._index, self._options = graph, index, options
        self._bits_of_kernels = [
            _bits(q_options.bits_of_kernel(entry.name)) for entry in self.kernels
        ]
        self._bits_of_activations = [
            _bits(q_options.bits_of_activation(name)) for name in self.activations
        ]
        self._axis, self._symmetric = axis_name, q_options.symmetric

    def _run(
        self,
        kernels: Sequence[Array],
        variables: Sequence[Array],
        x: Array,
        activation: Callable[[int, Array], Array] | None = None,
    ) -> Array:
        places = {name: i for i, name in enumerate(self.activations)}

        def hook(entry: Activation, value: Array) -> Array:
            return activation(places[entry.name], value) if activation else value

        names = [entry.name for entry in self.kernels]
        hooks = Hooks(
            dict(zip(names, kernels, strict=True)), hook, convolution=convolve
        )
        given = dict(zip(self.variables, variables, strict=True))
        return run_block(self._graph, self._index, given, x, hooks)

    def p_output(
        self, kernels: Sequence[Array], variables: Sequence[Array], x: Array
    ) -> Array:
        """Compute the output of P's block from P's kernels and variables."""
        return self._run(kernels, variables, x)

    def begin(
        self, kernels: Sequence[Array], shrinks: Sequence[Array | None]
    ) -> tuple[tuple[KernelGrid, ...], Learned]:
        """Make the grids of Q's kernels and the initial trained values, as in Q.

        Args:
          kernels: Q's kernels, in float32.
          shrinks: the `shrink` of each kernel, see `quant.kernel_range`.
        """
        begun = [
            rounding.start(kernel, bits, shrink, entry.out_axes, self._symmetric)
            for entry, kernel, bits, shrink in zip(
                self.kernels, kernels, self._bits_of_kernels, shrinks, strict=True
            )
        ]
        grids = tuple(grid for grid, _ in begun)
        return grids, Learned(
            rounding=tuple(v for _, v in begun),
            scales=tuple(jnp.zeros_like(grid.scale) for grid in grids),
            ranges=(jnp.zeros(()),) * len(self.activations),
        )

    def codes(self, learned: Learned, fixed: Fixed) -> list[Array]:
        """Compute the codes of the rounded kernels, float32."""
        return self._codes(learned, fixed, rounding.hard)

    def _codes(
        self, learned: Learned, fixed: Fixed, above: Callable[[Array], Array]
    ) -> list[Array]:
        return [
            rounding.codes(grid, above(v), bits)
            for grid, v, bits in zip(
                fixed.grids, learned.rounding, self._bits_of_kernels, strict=True
            )
        ]

    def scales(self, learned: Learned, fixed: Fixed) -> list[Array]:
        """Compute the scales of the kernels, [out] in the kernels' rank."""
        return [
            grid.scale * jnp.exp(factor)
            for grid, factor in zip(fixed.grids, learned.scales, strict=True)
        ]

    def ranges(self, learned: Learned, fixed: Fixed) -> list[tuple[Array, Array]]:
        """Compute the ranges of the activations; their zero points never change."""
        return [
            _stretched(*ends, jnp.exp(factor), bits)
            for ends, factor, bits in zip(
                fixed.ranges, learned.ranges, self._bits_of_activations, strict=True
            )
        ]

    def q_output(self, learned: Learned, fixed: Fixed, x: Array) -> Array:
        """Compute the output of Q's block with rounded kernels."""
        return self._q_output(learned, fixed, x, rounding.hard, lambda i, q, p: q)

    def _q_output(
        self,
        learned: Learned,
        fixed: Fixed,
        x: Array,
        above: Callable[[Array], Array],
        drop: Callable[[int, Array, Array], Array],
    ) -> Array:
        kernels = [
            (codes - grid.zero_point) * scale
            for codes, grid, scale in zip(
                self._codes(learned, fixed, above),
                fixed.grids,
                self.scales(learned, fixed),
                strict=True,
            )
        ]
        ranges = self.ranges(learned, fixed)

        def activation(i: int, value: Array) -> Array:
            bits, value = self._bits_of_activations[i], value.astype(jnp.float32)
            quantized = quant.fake_quant(value, *ranges[i], bits, learned=True)
            return drop(i + 1, quantized, value)

        return self._run(kernels, fixed.variables, x, activation)

    def loss(
        self,
        learned: Learned,
        fixed: Fixed,
        batch: Images,
        keys: Array,
        progress: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """Compute the loss on a device's share of a batch, and its terms.

        Args:
          learned: the trained values.
          fixed: the values that do not train.
          batch: the share of the batch.
          keys: keys [activations + 1] that draw which values are left unquantized; the
            same on all devices.
          progress: share of the iterations that are done.
        """

        def drop(stream: int, q: Array, p: Array) -> Array:
            return jnp.where(_coins(keys[stream], q.shape, self._axis), p, q)

        x = drop(0, batch.q_input, batch.p_input)
        q = self._q_output(learned, fixed, x, rounding.soft, drop)
        gap = q.astype(jnp.float32) - batch.p_output.astype(jnp.float32)
        error = jnp.mean(jnp.square(gap)) / fixed.mean_square
        after = jnp.clip((progress - _PENALTY_FREE) / (1 - _PENALTY_FREE), 0.0, 1.0)
        power = _FIRST_POWER + (_LAST_POWER - _FIRST_POWER) * after
        penalty = sum(
            (rounding.penalty(v, power) for v in learned.rounding), jnp.zeros(())
        )
        weight = jnp.where(progress < _PENALTY_FREE, 0.0, self._options.penalty)
        return error + weight * penalty, {"error": error, "penalty": penalty}

    def iterate(
        self, state: State, fixed: Fixed, images: Images, key: Array
    ) -> tuple[State, dict[str, Array]]:
        """Run one iteration; return the new state and the loss's terms before it.

        The drawn images and the values left unquantized depend on (key, state.step)
        alone.
        """
        options = self._options
        # Each split or randint takes XLA long to compile on CPU, so there is one split.
        keys = jax.random.split(
            jax.random.fold_in(key, state.step), len(self.activations) + 2
        )
        at = jax.random.bits(keys[-1], (options.batch_size,), jnp.uint32)
        at = collectives.share(at % images.p_input.shape[0], self._axis)
        batch = jax.tree.map(lambda x: x[at], images)
        done = (state.step - fixed.first_step).astype(jnp.float32)
        progress = done / options.iterations
        grads, terms = jax.grad(self.loss, has_aux=True)(
            state.learned, fixed, batch, keys, progress
        )
        grads, terms = collectives.mean_over((grads, terms), self._axis)
        # optax takes floats to the power of steps, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            direction, moments = _ADAM.update(grads, state.moments)
        falling = options.factor_rate * (1 + jnp.cos(jnp.pi * progress)) / 2
        learned = Learned(
            _moved(state.learned.rounding, direction.rounding, options.rate),
            _moved(state.learned.scales, direction.scales, falling),
            _moved(state.learned.ranges, direction.ranges, falling),
        )
        first = first_bad(state.first_bad_step, state.step, (terms, learned))
        state = State(state.step + 1, first, learned, moments)
        return state, {**terms, "first_bad_step": first}


def _bits(bits: int | None) -> int:
    if bits is None:
        raise ValueError(
            "q_options: kernels or activations in float32 cannot be"
            " reconstructed; give their bits"
        )
    return bits


def _moved(values: Any, direction: Any, rate: Any) -> Any:
    return jax.tree.map(lambda p, d: p - rate * d, values, direction)


def _coins(key: Array, shape: tuple[int, ...], axis_name: str | None) -> Array:
    """Draw fair random booleans for a device's share [b, ...] of a batch.

    Every bit of a random word is one boolean, since drawing a byte for each boolean
    takes much longer on CPU.
    """
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    size = math.prod(shape[1:])
    words = jax.random.bits(key, (devices * shape[0], -(-size // 32)), jnp.uint32)
    words = collectives.share(words, axis_name)[..., None]
    bits = (words >> jax.lax.broadcasted_iota(jnp.uint32, (1, 1, 32), 2)) & 1
    return bits.reshape(shape[0], -1)[:, :size].reshape(shape) == 1


def _stretched(lo: Array, hi: Array, factor: Array, bits: int) -> tuple[Array, Array]:
    """Multiply the scale of a range by a factor; its zero point stays."""
    _, scale, first = quant.grid(lo, hi, bits)
    step = scale * factor
    return first * step, (first + (2.0**bits - 1)) * step
