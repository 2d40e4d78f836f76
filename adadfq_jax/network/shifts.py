"""Variables that shift the outputs of kernels: batch norms' means, and biases."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from adadfq_jax.network.graph import Graph, Places
from adadfq_jax.network.operations import SHAPE
from adadfq_jax.network.program import Constant, Operand, Value

_BATCH = 2  # small, since biases are broadcast to the whole output


class Shift(NamedTuple):
    """A variable that is added to each output channel of a kernel's operation.

    Attributes:
      variable: the variable's name; it has one number for each channel.
      axis: the axis of the channels in the operation's output.
      sign: 1 for a bias, which is added, and -1 for a mean, which is subtracted.
    """

    variable: str
    axis: int
    sign: int


def find_shifts(graph: Graph) -> dict[str, Shift]:
    """Return the variable that shifts each kernel's output, by the kernel's name.

    A kernel is left out where neither a batch norm nor a sum with a variable follows
    its operation at once, or where another operation reads that variable.
    """
    places = graph.make_places(_BATCH)
    equations = places.program.equations
    readers: dict[Operand, list[int]] = {}
    for index, equation in enumerate(equations):
        for operand in equation.inputs:
            readers.setdefault(operand, []).append(index)
    names = dict(zip(places.program.leaves, graph.variables, strict=True))
    counts = Counter({names[leaf]: len(readers.get(leaf, ())) for leaf in names})
    found = {}
    for (index, _), place in places.kernels.items():
        shift = _shift(graph, places, equations[index].outputs[0], readers, names)
        if shift is not None and counts[shift.variable] == 1:
            found[graph.kernels[place].name] = shift
    return found


def _shift(
    graph: Graph,
    places: Places,
    value: Value,
    readers: dict[Operand, list[int]],
    names: dict[Value, str],
) -> Shift | None:
    equations = places.program.equations
    while True:
        for norm, (x, *_) in zip(graph.batch_norms, places.batch_norms, strict=True):
            if x is value and norm.variables[0]:
                return Shift(norm.variables[0], norm.axis % len(x.shape), -1)
        if len(readers.get(value, ())) != 1:
            return None
        equation = equations[readers[value][0]]
        if equation.name == "convert_element_type":
            value = equation.outputs[0]
            continue
        if equation.name != "add":
            return None
        (other,) = (x for x in equation.inputs if x is not value)
        return _bias(places, other, names, value.shape)


def _bias(
    places: Places, operand: Operand, names: dict[Value, str], shape: tuple[int, ...]
) -> Shift | None:
    """Return the shift of a value of this shape by a variable along one axis."""
    chain, source = [], operand
    while isinstance(source, Value) and source not in names:
        if source not in places.producers:  # the image itself
            return None
        equation = places.program.equations[places.producers[source]]
        if equation.name not in SHAPE or any(
            not isinstance(x, Constant) for x in equation.inputs[1:]
        ):
            return None
        chain.append(equation)
        source = equation.inputs[0]
    if not isinstance(source, Value):
        return None
    channels = int(np.prod(source.shape))
    index = np.arange(channels, dtype=np.float32).reshape(source.shape)
    for equation in chain[::-1]:
        others = [x.array for x in equation.inputs[1:] if isinstance(x, Constant)]
        (index,) = equation.evaluate([index, *others])
    index = np.asarray(index)
    for axis, length in enumerate(index.shape):
        along = [1] * index.ndim
        along[axis] = length
        if length == shape[axis] == channels and np.all(
            index == np.arange(length).reshape(along)
        ):
            return Shift(names[source], axis, 1)
    return None
