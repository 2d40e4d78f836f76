"""A traced network as ordinary JAX, with hooks where it can be quantized.

P is `run` that collects the inputs of batch norms; Q is `run` with hooks that quantize
kernels and activations. Everything here is pure: jit, vjp, vmap and pmap as usual.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax.errors import InputError
from adadfq_jax.network.graph import Activation, BatchNorm, Graph, Kernel, Places
from adadfq_jax.network.operations import SHAPE
from adadfq_jax.network.program import Constant, Equation, Operand, Value


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What happens at the entries of a graph; None lets a value pass.

    Attributes:
      kernel: (entry, kernel in float32 as its operation sees it) -> the one to use.
      activation: (entry, tensor) -> the one that goes on.
      batch_norm: (entry, its input, mean, variance) -> what `run` collects, where mean
        and variance are [channels].
      convolution: (equation's parameters, x, kernel) -> its output, in place of XLA's
        convolution.
    """

    kernel: Callable[[Kernel, Array], Array] | None = None
    activation: Callable[[Activation, Array], Array] | None = None
    batch_norm: Callable[[BatchNorm, Array, Array, Array], Any] | None = None
    convolution: Callable[[Mapping[str, Any], Array, Array], Array] | None = None


NO_HOOKS = Hooks()


def run(
    graph: Graph, variables: Any, images: Array, hooks: Hooks = NO_HOOKS
) -> tuple[Array, tuple[Any, ...]]:
    """Evaluates the network.

    Args:
      graph: of `trace`.
      variables: the network's, a tree as it was traced with.
      images: [B, H, W, channels] in P's normalised space, whatever the layout.
      hooks: see `Hooks`.

    Returns:
      Logits [B, classes], and what `hooks.batch_norm` gave, in the order of
      `graph.batch_norms`.

    Raises:
      InputError: images or variables are of another shape.
    """
    if images.shape[1:] != graph.image_shape:
        raise InputError(
            f"images: {images.shape}; the network takes [B, *{graph.image_shape}]"
        )
    if graph.layout == "NCHW":
        images = jnp.transpose(images, (0, 3, 1, 2))
    places = graph.make_places(images.shape[0])
    program = places.program
    known = _known(places, variables) | {program.image: images}
    return _evaluate(graph, places, known, program.output, hooks)


def run_block(
    graph: Graph,
    index: int,
    variables: Any,
    x: Array,
    hooks: Hooks = NO_HOOKS,
) -> Array:
    """Evaluates one block on its input.

    Args:
      graph: of `trace`.
      index: of the block in `graph.blocks`.
      variables: the network's.
      x: the output of the block before it, or images [B, H, W, channels] for the
        first.
      hooks: see `Hooks`.

    Returns:
      The block's output; the last one's are the logits.
    """
    places = graph.make_places(x.shape[0])
    before = places.cuts[index - 1] if index else places.program.image
    if not index and graph.layout == "NCHW":
        x = jnp.transpose(x, (0, 3, 1, 2))
    known = _known(places, variables) | {before: x}
    return _evaluate(graph, places, known, places.cuts[index], hooks)[0]


def _known(places: Places, variables: Any) -> dict[Any, Any]:
    leaves = jax.tree.leaves(variables)
    expected = [leaf.shape for leaf in places.program.leaves]
    found = [np.shape(leaf) for leaf in leaves]
    if found != expected:
        raise InputError(
            f"variables: their {len(found)} arrays do not have the shapes of the"
            f" {len(expected)} that the network was traced with"
        )
    return dict(zip(places.program.leaves, leaves, strict=True))


def _needed(places: Places, known: Mapping[Any, Any], wanted: Operand) -> list[int]:
    """Indices of the equations that a value needs, in order."""
    producers = places.producers
    found: set[int] = set()
    stack = [wanted]
    while stack:
        operand = stack.pop()
        if operand in known or operand not in producers:
            continue
        index = producers[operand]
        if index not in found:
            found.add(index)
            stack += places.program.equations[index].inputs
    return sorted(found)


def _evaluate(
    graph: Graph,
    places: Places,
    known: dict[Any, Any],
    wanted: Operand,
    hooks: Hooks,
) -> tuple[Any, tuple[Any, ...]]:
    values = dict(known)

    def read(operand: Operand) -> Any:
        return operand.array if isinstance(operand, Constant) else values[operand]

    for index in _needed(places, known, wanted):
        equation = places.program.equations[index]
        inputs = [read(operand) for operand in equation.inputs]
        for side in range(len(inputs)):
            place = places.kernels.get((index, side))
            if place is not None and hooks.kernel is not None:
                operand = equation.inputs[side]
                exact = _in_float32(places, operand, read).astype(jnp.float32)
                quantized = hooks.kernel(graph.kernels[place], exact)
                inputs[side] = quantized.astype(inputs[side].dtype)
        is_convolution = equation.name == "conv_general_dilated"
        if is_convolution and hooks.convolution is not None:
            outputs = [hooks.convolution(equation.params, *inputs)]
        else:
            outputs = list(equation.evaluate(inputs))
        for value, found in zip(equation.outputs, outputs, strict=True):
            place = places.activations.get(value)
            if place is not None and hooks.activation is not None:
                changed = hooks.activation(graph.activations[place], found)
                found = changed.astype(found.dtype)
            values[value] = found
    return read(wanted), _collect(graph, places, read, values, hooks)


def _collect(
    graph: Graph,
    places: Places,
    read: Callable[[Operand], Any],
    values: Mapping[Any, Any],
    hooks: Hooks,
) -> tuple[Any, ...]:
    if hooks.batch_norm is None:
        return ()
    return tuple(
        hooks.batch_norm(
            entry, values[x], jnp.ravel(read(mean)), jnp.ravel(read(variance))
        )
        for entry, (x, mean, variance) in zip(
            graph.batch_norms, places.batch_norms, strict=True
        )
        if x in values
    )


def _in_float32(
    places: Places, operand: Operand, read: Callable[[Operand], Any]
) -> Array:
    """A kernel as its operation sees it, but before it is made less precise.

    A network that computes in bfloat16 converts its float32 variables; integers are to
    be those of the variables.
    """
    chain: list[Equation] = []
    source = operand
    while isinstance(source, Value) and source.aval.dtype != jnp.float32:
        index = places.producers.get(source)
        equation = None if index is None else places.program.equations[index]
        if equation is None or equation.name not in SHAPE:
            return read(operand)
        chain.append(equation)
        source = equation.inputs[0]
    found = read(source)
    for equation in reversed(chain):
        if equation.name != "convert_element_type":
            (found,) = equation.evaluate([found, *map(read, equation.inputs[1:])])
    return found
