"""Runs a traced network, with hooks where it can be quantized.

P is `run` with a hook that collects the inputs of batch norms. Q is `run` with other
kernels and a hook that quantizes activations. All functions are pure and work under
jit, vjp, vmap and pmap.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """Replacements at the entries of a graph; a hook that is None changes nothing.

    Attributes:
      kernels: kernels that replace the network's own, by name, with the shapes that
        the function `kernels` returns. Variables that only the replaced kernels are
        computed from are not needed.
      activation: (entry, tensor) -> the tensor that replaces it.
      batch_norm: (entry, its input, mean, variance) -> the value that `run` collects,
        where mean and variance are [channels].
      convolution: (equation's parameters, x, kernel) -> the output, in place of XLA's
        convolution.
      output: (entry of the kernel, output of its operation, kernel -> output) -> the
        output that replaces it; the last argument computes it with another kernel.
    """

    kernels: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    activation: Callable[[Activation, Array], Array] | None = None
    batch_norm: Callable[[BatchNorm, Array, Array, Array], Any] | None = None
    convolution: Callable[[Mapping[str, Any], Array, Array], Array] | None = None
    output: Callable[[Kernel, Array, Callable[[Array], Array]], Array] | None = None


NO_HOOKS = Hooks()


def run(
    graph: Graph, variables: Any, images: Array, hooks: Hooks = NO_HOOKS
) -> tuple[Array, dict[str, Any]]:
    """Evaluate the network.

    Args:
      graph: the traced network, see `trace`.
      variables: the network's variables, in a tree like the traced one.
      images: [B, H, W, channels] in P's normalised space, in every layout.
      hooks: see `Hooks`.

    Returns:
      Logits [B, classes], and the results of `hooks.batch_norm` by the batch norms'
      names.

    Raises:
      InputError: images or variables have another shape than the traced ones.
    """
    if images.shape[1:] != graph.image_shape:
        raise InputError(
            f"images: {images.shape}; the network takes [B, *{graph.image_shape}]"
        )
    if graph.layout == "NCHW":
        images = jnp.transpose(images, (0, 3, 1, 2))
    places = graph.make_places(images.shape[0])
    known = _known(graph, places, variables) | {places.program.image: images}
    return _evaluate(graph, places, known, places.program.output, hooks)


def run_block(
    graph: Graph,
    index: int,
    variables: Any,
    x: Array,
    hooks: Hooks = NO_HOOKS,
) -> Array:
    """Evaluate one block on its input.

    Args:
      graph: the traced network, see `trace`.
      index: the block's index in `graph.blocks`.
      variables: the network's variables.
      x: the output of the block before it; for the first block, images
        [B, H, W, channels].
      hooks: see `Hooks`.

    Returns:
      The block's output, which is the logits for the last block.
    """
    places = graph.make_places(x.shape[0])
    before = places.cuts[index - 1] if index else places.program.image
    if not index and graph.layout == "NCHW":
        x = jnp.transpose(x, (0, 3, 1, 2))
    known = _known(graph, places, variables) | {before: x}
    return _evaluate(graph, places, known, places.cuts[index], hooks)[0]


def block_variables(graph: Graph, index: int) -> tuple[str, ...]:
    """Find the names of the variables that a block needs beside its kernels.

    Args:
      graph: the traced network, see `trace`.
      index: the block's index in `graph.blocks`.
    """
    places = graph.make_places(graph.traced_batch)
    before = places.cuts[index - 1] if index else places.program.image
    replaced = frozenset(places.kernels)
    read = {
        operand
        for at in places.needed([places.cuts[index]], {before}, replaced)
        for side, operand in enumerate(places.program.equations[at].inputs)
        if (at, side) not in replaced
    }
    pairs = zip(graph.variables, places.program.leaves, strict=True)
    return tuple(name for name, leaf in pairs if leaf in read)


def kernels(graph: Graph, variables: Any) -> dict[str, Array]:
    """Return the kernels by name, in float32, with the shapes their operations see.

    A network that computes in bfloat16 converts its float32 variables. Its kernels are
    returned as they were before that conversion.
    """
    places = graph.make_places(graph.traced_batch)
    operands = {
        graph.kernels[place].name: places.program.equations[index].inputs[side]
        for (index, side), place in places.kernels.items()
    }
    converted = {
        name: _before_conversion(places, operand) for name, operand in operands.items()
    }
    sources = [source for source, _ in converted.values()]
    values = _values(graph, places, variables, sources)
    found = {}
    for name, (source, chain) in converted.items():
        value = values[source]
        for equation in chain:
            if equation.name != "convert_element_type":
                others = [_read({}, operand) for operand in equation.inputs[1:]]
                (value,) = equation.evaluate([value, *others])
        found[name] = jnp.asarray(value, jnp.float32)
    return found


def statistics(graph: Graph, variables: Any) -> dict[str, dict[str, Array]]:
    """Return the 'mean' and 'var' [channels] of each batch norm, by its name."""
    places = graph.make_places(graph.traced_batch)
    wanted = [value for _, *both in places.batch_norms for value in both]
    values = _values(graph, places, variables, wanted)
    return {
        norm.name: {"mean": jnp.ravel(values[mean]), "var": jnp.ravel(values[variance])}
        for norm, (_, mean, variance) in zip(
            graph.batch_norms, places.batch_norms, strict=True
        )
    }


def _values(
    graph: Graph, places: Places, variables: Any, wanted: Iterable[Operand]
) -> dict[Any, Any]:
    """Compute values that do not depend on the images."""
    wanted = list(wanted)
    values = _known(graph, places, variables)
    for index in places.needed(wanted, values):
        equation = places.program.equations[index]
        inputs = [_read(values, operand) for operand in equation.inputs]
        values.update(zip(equation.outputs, equation.evaluate(inputs), strict=True))
    return {operand: _read(values, operand) for operand in wanted}


def _read(values: Mapping[Any, Any], operand: Operand) -> Any:
    if isinstance(operand, Constant):
        return operand.array
    if operand not in values:
        raise InputError("variables: some that the network needs are missing")
    return values[operand]


def _known(graph: Graph, places: Places, variables: Any) -> dict[Any, Any]:
    """Return the given variables by their value in the program."""
    given = named(variables)
    known = {}
    for name, value in zip(graph.variables, places.program.leaves, strict=True):
        if name not in given:
            continue
        if np.shape(given[name]) != value.shape:
            raise InputError(
                f"variables: {name} is {np.shape(given[name])}; the network was traced"
                f" with {value.shape}"
            )
        known[value] = given[name]
    return known


_COLLECTIONS = ("params", "batch_stats")


def _name_of(path: tuple[Any, ...], skip: tuple[str, ...]) -> str:
    parts = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        for key in path
    ]
    if len(parts) > 1 and parts[-1] == "value":
        del parts[-1]  # NNX ends the path of each variable with it
    if len(parts) > 1 and parts[0] in skip:
        parts = parts[1:]
    return ".".join(parts) or "variables"


def named(variables: Any) -> dict[str, Any]:
    """Name the leaves of a tree, in the order of the tree.

    A name is the leaf's path joined by dots. The collection at its beginning ('params',
    'batch_stats') is left out, unless two leaves would then have the same name.

    Raises:
      InputError: two leaves have the same full path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    for skip in (_COLLECTIONS, ()):
        found = {_name_of(path, skip): leaf for path, leaf in leaves}
        if len(found) == len(leaves):
            return found
    raise InputError(
        "variables: two have the same name, the path's keys joined by dots; rename one"
    )


def _evaluate(
    graph: Graph,
    places: Places,
    known: dict[Any, Any],
    wanted: Operand,
    hooks: Hooks,
) -> tuple[Any, dict[str, Any]]:
    values = dict(known)
    replaced = {
        at: hooks.kernels[graph.kernels[place].name]
        for at, place in places.kernels.items()
        if graph.kernels[place].name in hooks.kernels
    }

    def pass_on(value: Any, found: Any) -> None:
        place = places.activations.get(value)
        if place is not None and hooks.activation is not None:
            changed = hooks.activation(graph.activations[place], found)
            found = changed.astype(found.dtype)
        values[value] = found

    if places.program.image in known:
        pass_on(places.program.image, known[places.program.image])
    for index in places.needed([wanted], known, replaced):
        equation = places.program.equations[index]
        inputs = [
            replaced[index, side].astype(operand.aval.dtype)
            if (index, side) in replaced and isinstance(operand, Value)
            else _read(values, operand)
            for side, operand in enumerate(equation.inputs)
        ]
        outputs = _outputs(equation, hooks, inputs)
        for side in range(len(inputs)):
            place = places.kernels.get((index, side))
            if place is not None and hooks.output is not None:
                again = functools.partial(_with_kernel, equation, hooks, inputs, side)
                outputs = [hooks.output(graph.kernels[place], outputs[0], again)]
        for value, found in zip(equation.outputs, outputs, strict=True):
            pass_on(value, found)
    return _read(values, wanted), _collect(graph, places, values, hooks)


def _outputs(equation: Equation, hooks: Hooks, inputs: list[Any]) -> Sequence[Any]:
    is_convolution = equation.name == "conv_general_dilated"
    if is_convolution and hooks.convolution is not None:
        return [hooks.convolution(equation.parameters, *inputs)]
    return equation.evaluate(inputs)


def _with_kernel(
    equation: Equation, hooks: Hooks, inputs: list[Any], side: int, kernel: Array
) -> Array:
    changed = list(inputs)
    changed[side] = kernel.astype(inputs[side].dtype)
    return _outputs(equation, hooks, changed)[0]


def _collect(
    graph: Graph, places: Places, values: dict[Any, Any], hooks: Hooks
) -> dict[str, Any]:
    if hooks.batch_norm is None:
        return {}
    collected = {}
    for entry, (x, *both) in zip(graph.batch_norms, places.batch_norms, strict=True):
        if x in values:
            mean, variance = (jnp.ravel(_read(values, value)) for value in both)
            collected[entry.name] = hooks.batch_norm(entry, values[x], mean, variance)
    return collected


def _before_conversion(
    places: Places, operand: Operand
) -> tuple[Operand, list[Equation]]:
    """Find the float32 source of a kernel and the shape operations that follow it."""
    chain: list[Equation] = []
    source = operand
    while isinstance(source, Value) and source.aval.dtype != jnp.float32:
        index = places.producers.get(source)
        equation = None if index is None else places.program.equations[index]
        if (
            equation is None
            or equation.name not in SHAPE
            or any(not isinstance(x, Constant) for x in equation.inputs[1:])
        ):
            return operand, []
        chain.append(equation)
        source = equation.inputs[0]
    return source, chain[::-1]
