"""How much each layer suffers from few bits, measured on generated images.

One layer at a time is quantized: its kernel, its operand, or both; all others stay in
float32. The measure is the divergence of that Q from P, the mean over the images of
KL(softmax p || softmax q), in nats.

The quantized kernels and the bits of the activations are arguments of the compiled
programs, so that all layers and all numbers of bits share one program. Another program
quantizes kernels; it is compiled for each shape.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax import losses, quant
from adadfq_jax.errors import InputError
from adadfq_jax.game import QOptions, layer_bits, players
from adadfq_jax.models.convolution import convolve
from adadfq_jax.network import Graph, Hooks, kernels, run
from adadfq_jax.network.graph import Activation
from adadfq_jax.runtime import tables
from adadfq_jax.training.images import split

BITS = (2, 3, 4, 8)
IMAGES = 128


class Layer(NamedTuple):
    """The sensitivity of a layer.

    Attributes:
      name: name of the layer.
      kernel: name of its kernel.
      activation: name of its operand, '' where that is not quantized.
      size: share of the values of all kernels.
      multiplications: share of the network's multiplications.
      divergence: by part ('kernel', 'operand' or 'both') and number of bits, in nats.
    """

    name: str
    kernel: str
    activation: str
    size: float
    multiplications: float
    divergence: dict[str, dict[int, float]]

    def at(self, bits: int) -> float:
        """Return the divergence where all that is quantized of the layer has `bits`."""
        return self.divergence["both" if self.activation else "kernel"][bits]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantized(
    kernel: Array,
    bits: Array,
    out_axes: tuple[int, ...],
    clipped: bool,
    symmetric: bool,
) -> Array:
    shrink = None
    if clipped:
        shrink = quant.least_error_kernel_shrink(kernel, bits, out_axes, symmetric)
    return quant.fake_quant_kernel(kernel, bits, shrink, out_axes, symmetric)


class Programs:
    """The compiled programs, and the values that every measurement shares.

    Args:
      graph: the traced network.
      options: see `measure`.
      variables: P's variables, by name.
      batches: images on which ranges are chosen and divergences measured.
    """

    def __init__(
        self,
        graph: Graph,
        options: QOptions,
        variables: Mapping[str, Any],
        batches: Sequence[Array],
    ):
        self._graph, self._options = graph, options
        self._variables, self._batches = dict(variables), batches
        self._kernels = jax.jit(functools.partial(kernels, graph))(self._variables)
        names = [entry.name for entry in graph.activations]
        self._at = {name: place for place, name in enumerate(names)}
        self._measure = jax.jit(self._divergence)
        p_logits = jax.jit(functools.partial(players.p_logits, graph))
        self._p = [p_logits(self._variables, images) for images in batches]
        observe = jax.jit(self._observe)
        seen = [observe(self._variables, images) for images in batches]
        self._ranges = np.mean(jax.device_get(seen), 0)  # [activations, BITS, 2]

    def _observe(self, variables: Mapping[str, Any], images: Array) -> Array:
        """Return the ranges [activations, BITS, 2] of P's activations."""
        found: dict[str, Array] = {}

        def activation(entry: Activation, x: Array) -> Array:
            how, seen = self._options.act_range, x.astype(jnp.float32)
            ends = [jnp.stack(quant.observed_range(seen, k, how)) for k in BITS]
            found[entry.name] = jnp.stack(ends)
            return x

        hooks = Hooks(activation=activation, convolution=convolve)
        run(self._graph, variables, images, hooks)
        empty = jnp.zeros((0, len(BITS), 2))
        return jnp.stack([found[name] for name in self._at]) if found else empty

    def logits(
        self,
        variables: Mapping[str, Any],
        images: Array,
        kernels: Mapping[str, Array],
        ranges: Array,
        bits: Array,
    ) -> Array:
        """Compute logits [B, classes]; activations of 0 bits are not quantized.

        Args:
          variables: P's variables, by name.
          images: [B, H, W, C].
          kernels: the kernels, by name.
          ranges: lo and hi of each activation, [activations, 2].
          bits: of each activation, int32 [activations].
        """

        def activation(entry: Activation, x: Array) -> Array:
            place = self._at[entry.name]
            own, value = bits[place], x.astype(jnp.float32)
            # The program also computes it where it is not used.
            quantized = quant.fake_quant(
                value, ranges[place, 0], ranges[place, 1], jnp.maximum(own, 2)
            )
            return jnp.where(own > 0, quantized, value)

        hooks = Hooks(kernels, activation, convolution=convolve)
        logits, _ = run(self._graph, variables, images, hooks)
        return logits.astype(jnp.float32)

    def _divergence(
        self, variables: Any, images: Array, p_logits: Array, *quantized: Any
    ) -> Array:
        """Return KL(p || q)."""
        q_logits = self.logits(variables, images, *quantized)
        return losses.student_kl(p_logits, q_logits, temperature=1.0)

    def quantized(self, kernel: str, activation: str, bits: int) -> tuple[Any, ...]:
        """Return the last arguments of `logits` for one kernel and one activation.

        Args:
          kernel: name of the kernel, '' for none.
          activation: name of the activation, '' for none.
          bits: of both, one of `BITS`.
        """
        own = dict(self._kernels)
        if kernel:
            (entry,) = (each for each in self._graph.kernels if each.name == kernel)
            clipped = self._options.weight_range == "mse" and quant.is_clipped(
                entry.shape, bits, entry.out_axes
            )
            own[kernel] = _quantized(
                *(own[kernel], np.int32(bits), entry.out_axes, clipped),
                self._options.symmetric,
            )
        ranges = self._ranges[:, BITS.index(bits)]
        each = np.zeros(len(self._at), np.int32)
        if activation:
            each[self._at[activation]] = bits
        return own, ranges, each

    def divergence(self, kernel: str, activation: str, bits: int) -> float:
        """Return the divergence with one kernel and one activation quantized.

        Args:
          kernel: see `quantized`.
          activation: see `quantized`.
          bits: see `quantized`.
        """
        quantized = self.quantized(kernel, activation, bits)
        found = [
            self._measure(self._variables, images, p, *quantized)
            for images, p in zip(self._batches, self._p, strict=True)
        ]
        return max(0.0, float(np.mean(jax.device_get(found))))


def measure(
    graph: Graph, options: QOptions, variables: Mapping[str, Any], images: Array
) -> list[Layer]:
    """Measure every layer, in the order of the network.

    Args:
      graph: the traced network.
      options: how ranges of kernels and activations are chosen; its bits do not count.
      variables: P's variables, by name.
      images: [N, H, W, C] in P's normalised space.

    Raises:
      InputError: a number is not finite.
    """
    programs = Programs(graph, options, variables, split(images))
    measured = functools.cache(programs.divergence)
    values = sum(math.prod(entry.shape) for entry in graph.kernels)
    layers = []
    for entry in graph.kernels:
        parts = {"kernel": (entry.name, "")}
        if entry.activation:
            parts |= {
                "operand": ("", entry.activation),
                "both": (entry.name, entry.activation),
            }
        found = {
            part: {bits: measured(*names, bits) for bits in BITS}
            for part, names in parts.items()
        }
        if not all(math.isfinite(x) for by in found.values() for x in by.values()):
            raise InputError(f"{entry.name}: its divergence is not finite")
        layers.append(
            Layer(
                layer_bits.layer_of(entry.name),
                entry.name,
                entry.activation,
                math.prod(entry.shape) / values,
                entry.multiplications / graph.multiplications,
                found,
            )
        )
    return layers


def ranked(layers: Sequence[Layer], bits: int) -> list[Layer]:
    """Return the layers, the most sensitive at a number of bits first."""
    return sorted(layers, key=lambda layer: -layer.at(bits))


_MOST_SIZE = 0.2  # share of the kernels' values that the advice may name


def standouts(layers: Sequence[Layer], bits: int) -> list[Layer]:
    """Return the layers that should have more bits than the others.

    These are the most sensitive layers that together make up half of the divergence,
    as far as they hold at most a fifth of the kernels' values.

    Args:
      layers: the layers.
      bits: the number of bits of the others, one of `BITS`.
    """
    total = sum(layer.at(bits) for layer in layers)
    chosen: list[Layer] = []
    for layer in ranked(layers, bits):
        if 2 * sum(each.at(bits) for each in chosen) >= total:
            break
        if sum(each.size for each in chosen) + layer.size <= _MOST_SIZE:
            chosen.append(layer)
    return chosen


def advise(layers: Sequence[Layer], bits: int) -> str:
    """Say in words which layers should have 8 bits, and what that costs.

    Args:
      layers: the layers.
      bits: the number of bits of the others, one of `BITS` below 8.
    """
    chosen, total = standouts(layers, bits), sum(layer.at(bits) for layer in layers)
    if not chosen:
        return f"At {bits} bits no small layer stands out."
    saved = sum(layer.at(bits) - layer.at(BITS[-1]) for layer in chosen)
    size = sum(layer.size for layer in chosen)
    work = sum(layer.multiplications for layer in chosen)
    *first, last = [f"`{layer.name}`" for layer in chosen]
    names = f"{', '.join(first)} and {last}" if first else last
    rules = ",".join(f"{re.escape(layer.name)}=w8a8" for layer in chosen)
    return (
        f"At {bits} bits, keep {names} at 8 bits: {100 * saved / total:.0f} % less"
        f" divergence for {100 * size:.1f} % of the weights and {100 * work:.1f} % of"
        f" the multiplications (config.quant.layer_bits='{rules}')."
    )


def to_json(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return the layers as JSON values."""
    return [
        {
            **layer._asdict(),
            "divergence": {
                part: {str(bits): value for bits, value in by.items()}
                for part, by in layer.divergence.items()
            },
        }
        for layer in layers
    ]


_WIDTH = 120  # columns of the table; names of layers are long


def table(layers: Sequence[Layer], bits: int) -> str:
    """Return a table for a terminal, the most sensitive layers first.

    Args:
      layers: the layers.
      bits: the number of bits at which they are ranked.
    """
    numbers = [f"{part}{k}" for part in "WA" for k in BITS]
    rows = [
        [
            layer.name,
            f"{100 * layer.size:.1f} %",
            f"{100 * layer.multiplications:.1f} %",
            *(
                tables.number(layer.divergence.get(part, {}).get(k), 4)
                for part in ("kernel", "operand")
                for k in BITS
            ),
        ]
        for layer in ranked(layers, bits)
    ]
    return tables.to_text(
        f"Divergence of Q from P in nats, one layer quantized, ranked at {bits} bits",
        ["layer", "size", "mult.", *numbers],
        rows,
        width=_WIDTH,
    )
