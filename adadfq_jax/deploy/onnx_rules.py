"""Translation of a traced network into an ONNX graph: a rule for each primitive.

What depends on constants alone is computed here. Factors and terms per channel are
carried along (`Linear`) until they meet a nonlinearity: those of batch norms end in the
scales of the kernel before them and in the convolution's bias, at no cost.

Shapes and axes are JAX's, of the traced batch, whose length no other axis has; where
the axes lie in the graph is the `Tensor`'s order. Convolutions and pools want channels
first, everything else leaves its input as it lies where it can.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from adadfq_jax.deploy.codes import Kernel, Range
from adadfq_jax.deploy.onnx_graph import Graph, Tensor, features_first
from adadfq_jax.errors import InputError
from adadfq_jax.network import Graph as Network
from adadfq_jax.network.graph import Places
from adadfq_jax.network.program import Constant, Equation, inside

_ONE, _ZERO = np.ones((), np.float32), np.zeros((), np.float32)


def translate(
    graph: Graph,
    network: Network,
    images: Tensor,
    *,
    variables: Mapping[str, Any],
    kernels: Mapping[str, Kernel | np.ndarray],
    ranges: Mapping[str, Range],
) -> Tensor:
    """Adds a network to an ONNX graph.

    Args:
      graph: gets the nodes.
      network: of `trace`.
      images: normalised, [network.traced_batch, ...] in the network's layout.
      variables: by name; those that only `kernels` are computed from may be missing.
      kernels: by name, as integers or float32, of the shapes that their operations see;
        one that is missing is computed from the variables.
      ranges: of the activations by name; one that is missing stays in float32.

    Returns:
      The logits.

    Raises:
      InputError: the network has an operation for which there is no rule, or variables
        are missing.
    """
    places = network.make_places(network.traced_batch)
    program = places.program
    quantized = {
        value: ranges[network.activations[place].name]
        for value, place in places.activations.items()
        if network.activations[place].name in ranges
    }
    translator = _Translator(graph, network.traced_batch, quantized)
    equations = _needed(_with_kernels(places, network, kernels), program.output)
    read = {operand for equation in equations for operand in equation.inputs}
    for name, leaf in zip(network.variables, program.leaves, strict=True):
        if leaf in read and name in variables:
            translator.set(leaf, np.asarray(variables[name]))
    translator.set(program.image, images)
    (logits,) = translator.run(equations, [program.output])
    return translator.tensor(logits, range(len(logits.shape)))


def normalised(
    graph: Graph,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int,
) -> Tensor:
    """Adds (images / 255 - mean) / std of uint8 pixels.

    Args:
      graph: gets the nodes.
      images: uint8.
      mean: of each channel.
      std: likewise.
      channels: axis of the channels in `images.shape`, wherever it is in the graph.
    """
    to_float = {"to": onnx.TensorProto.FLOAT}
    x = graph.node("Cast", [images.name], images.shape, images.order, **to_float)
    shape = [-1 if axis == channels else 1 for axis in images.order]
    for operator, values in (("Div", 255), ("Sub", mean), ("Div", std)):
        array = np.asarray(values, np.float32)
        constant = graph.constant(array.reshape(shape if array.ndim else ()))
        x = graph.node(operator, [x.name, constant], x.shape, x.order)
    return x


def _with_kernels(
    places: Places, network: Network, kernels: Mapping[str, Kernel | np.ndarray]
) -> list[Equation]:
    """The equations, of which some read a kernel in place of a value."""
    equations = list(places.program.equations)
    for (index, side), place in places.kernels.items():
        entry = network.kernels[place]
        if entry.name in kernels:
            inputs = list(equations[index].inputs)
            inputs[side] = Constant(_Kernel(entry.variable, kernels[entry.name]))
            equations[index] = dataclasses.replace(
                equations[index], inputs=tuple(inputs)
            )
    return equations


def _needed(equations: Sequence[Equation], output: Any) -> list[Equation]:
    """The equations that an output is computed by."""
    wanted, found = {output}, []
    for equation in reversed(equations):
        if not wanted.isdisjoint(equation.outputs):
            wanted.update(equation.inputs)
            found.append(equation)
    return found[::-1]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Stands for an operand that is a kernel."""

    name: str
    values: Kernel | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """As the operation sees it."""
        codes = self.values
        return codes.codes.shape if isinstance(codes, Kernel) else codes.shape


@dataclasses.dataclass(frozen=True)
class _Product:
    """A convolution or a product with a kernel that is not in the graph yet.

    Attributes:
      operator: 'Conv', 'Gemm', or 'MatMul' of matrices for the axes before.
      x: the name of the activation.
      kernel: [out, ...].
      shape: of the result.
      order: likewise, see `Tensor`.
      channels: axes of the result that the kernel's output channels are.
      attributes: of the node.
    """

    operator: str
    x: str
    kernel: _Kernel
    shape: tuple[int, ...]
    order: tuple[int, ...]
    channels: tuple[int, ...]
    batches: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def permuted(self, permutation: Sequence[int]) -> "_Product":
        """JAX's transpose."""
        moved = Tensor("", self.shape, self.order).permuted(permutation)
        channels = tuple(permutation.index(axis) for axis in self.channels)
        return dataclasses.replace(
            self, shape=moved.shape, order=moved.order, channels=channels
        )

    def takes(self, values: np.ndarray) -> bool:
        """Whether values that are broadcast to the result are one for each channel."""
        sizes = enumerate(values.shape)
        return all(size == 1 or axis in self.channels for axis, size in sizes)

    def per_channel(self, values: np.ndarray) -> np.ndarray:
        """Those values as [out]."""
        axes = range(len(self.shape))
        sizes = [self.shape[a] if a in self.channels else 1 for a in axes]
        others = [axis for axis in axes if axis not in self.channels]
        full = np.broadcast_to(values, sizes)
        return full.transpose(*self.channels, *others).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """source * factor + term, both broadcast to the source."""

    source: Any
    factor: np.ndarray
    term: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """JAX's."""
        return self.source.shape


@dataclasses.dataclass(frozen=True)
class _Quantized:
    """An activation's quantizer that is not in the graph yet."""

    x: Any
    parameters: Range
    whole_bytes: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """JAX's."""
        return self.x.shape


@dataclasses.dataclass(frozen=True)
class _Reshaped:
    """A reshape that is not in the graph yet; the next one may undo it."""

    source: Any
    shape: tuple[int, ...]


def _refuse(what: str) -> InputError:
    return InputError(f"the network has {what}, for which there is no ONNX rule")


class _Translator:
    """Evaluates equations on values that are constants, kernels or edges of a graph.

    A value is an array, a `_Kernel`, a `Tensor`, or one that is not in the graph yet:
    `_Linear`, `_Quantized` or `_Reshaped`.

    Args:
      graph: gets the nodes.
      batch: images in the traced batch.
      quantized: the ranges of values that are quantized.
    """

    def __init__(self, graph: Graph, batch: int, quantized: Mapping[Any, Range]):
        self.graph = graph
        self._batch, self._ranges = batch, quantized
        self._values: dict[Any, Any] = {}
        self._uses: collections.Counter[Any] = collections.Counter()
        self._emitted: dict[Any, tuple[Any, Tensor]] = {}
        self._bare: dict[str, int] = {}  # bits of the kernel that an edge comes from

    # Evaluation.

    def run(self, equations: Sequence[Equation], outputs: Sequence[Any]) -> list[Any]:
        """Evaluates equations; the values of the outputs."""
        for equation in equations:
            self._uses.update(equation.inputs)
        self._uses.update(outputs)
        for equation in equations:
            inputs = [self._get(operand) for operand in equation.inputs]
            found = self._evaluate(equation, inputs)
            for value, what in zip(equation.outputs, found, strict=True):
                self.set(value, what)
        return [self._get(output) for output in outputs]

    def set(self, value: Any, found: Any) -> None:
        """Says what a value of the program is."""
        if value in self._ranges:
            if value.aval.dtype != np.float32:
                raise _refuse(f"an activation of {value.aval.dtype}")
            found = _Quantized(
                self._apart(found, self._ranges[value]), self._ranges[value]
            )
        self._values[value] = found

    def _apart(self, value: Any, parameters: Range) -> Tensor:
        """What is to be quantized, with an Add behind a product that has no bias.

        ONNX Runtime fuses a product and the quantizer behind it, and then refuses codes
        of less than 8 bits. It removes an Add of a single zero.
        """
        x = self.tensor(value)
        if (
            min(self._bare.get(x.name, 8), parameters.bits) == 8
            or x.name not in self._bare
        ):
            return x
        batch = self.batch_axis(x.shape)
        longest = max(n for axis, n in enumerate(x.shape) if axis != batch)
        at = x.shape.index(longest)
        zeros = np.zeros([longest if axis == at else 1 for axis in x.order], np.float32)
        names = [x.name, self.graph.constant(zeros)]
        return self.graph.node("Add", names, x.shape, x.order)

    def _get(self, operand: Any) -> Any:
        if isinstance(operand, Constant):
            array = operand.array
            return array if isinstance(array, _Kernel) else np.asarray(array)
        if operand not in self._values:
            raise InputError("variables: some that the network needs are missing")
        found = self._values[operand]
        if isinstance(found, _Linear) and self._uses[operand] > 1:
            # What each reader multiplies it by must not make the product twice.
            found = self._values[operand] = self.tensor(found)
        return found

    def _evaluate(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        if all(isinstance(value, np.ndarray) for value in inputs):
            return [np.asarray(value) for value in equation.evaluate(inputs)]
        if equation.name in _RULES:
            rule, (x, *others) = _RULES[equation.name], inputs
            moved = equation.name in _MOVING and isinstance(x, _Quantized)
            found = rule(self, equation, x.x if moved else x, *others)
            several = found if equation.primitive.multiple_results else [found]
            if not moved:
                return several
            # The quantizer goes behind it, next to who reads it, and is the same, for
            # it keeps the order. ONNX Runtime pools codes, but none of 4 bits.
            pooled = equation.name == "reduce_window_max"
            whole_bytes = x.whole_bytes or pooled
            return [_Quantized(y, x.parameters, whole_bytes) for y in several]
        within = inside(equation)
        if within is None:
            raise _refuse(repr(equation.name))
        self._uses.subtract(equation.inputs)  # those inside are counted in their place
        return self.run(*within)

    # Values that are not in the graph yet.

    def linear(self, x: Any, by: Any = 1, plus: Any = 0) -> _Linear:
        """X * by + plus, where one of them is an array that does not change x's shape.

        Raises:
          InputError: it differs from image to image of a batch.
        """
        by, plus = (self._compact(np.asarray(v, np.float32)) for v in (by, plus))
        one, zero = np.ones((), np.float32), np.zeros((), np.float32)
        old = x if isinstance(x, _Linear) else _Linear(x, one, zero)
        if isinstance(old.source, _Product) and not (
            old.source.takes(by) and old.source.takes(plus)
        ):
            old = _Linear(self.tensor(x), one, zero)
        return _Linear(old.source, old.factor * by, old.term * by + plus)

    def reshaped(self, x: Any, shape: Iterable[int]) -> Any:
        """JAX's reshape."""
        shape = tuple(int(size) for size in shape)
        if isinstance(x, _Quantized):
            return dataclasses.replace(x, x=self.reshaped(x.x, shape))
        source = x.source if isinstance(x, _Reshaped) else x
        return source if source.shape == shape else _Reshaped(source, shape)

    def permuted(self, x: Any, permutation: Sequence[int]) -> Any:
        """JAX's transpose, which adds no node."""
        permutation = tuple(int(axis) for axis in permutation)
        if isinstance(x, _Quantized):
            return dataclasses.replace(x, x=self.permuted(x.x, permutation))
        if isinstance(x, _Linear) and isinstance(x.source, _Product | Tensor):
            both = (
                values.transpose(permutation) if values.ndim else values
                for values in (x.factor, x.term)
            )
            return _Linear(x.source.permuted(permutation), *both)
        return self.tensor(x).permuted(permutation)

    # Edges of the graph.

    def tensor(self, value: Any, order: Sequence[int] | None = None) -> Tensor:
        """The value as an edge of the graph, added when it is first asked for.

        Args:
          value: no array.
          order: that it must have, or None.

        Raises:
          InputError: it is a kernel.
        """
        order = None if order is None else tuple(order)
        if isinstance(value, Tensor):
            found = value
        else:
            if id(value) not in self._emitted:
                self._emitted[id(value)] = value, self._emit(value, order)
            _, found = self._emitted[id(value)]
        if order is None or order == found.order:
            return found
        key = found, order
        if key not in self._emitted:
            perm = found.axes(order)
            moved = self.graph.node(
                "Transpose", [found.name], found.shape, order, perm=perm
            )
            self._emitted[key] = found, moved
        return self._emitted[key][1]

    def _emit(self, value: Any, order: tuple[int, ...] | None) -> Tensor:
        if isinstance(value, _Quantized):
            return self._quantizer(value, self.tensor(value.x, order))
        if isinstance(value, _Reshaped):
            return self._reshape(self.tensor(value.source), value.shape, order)
        if not isinstance(value, _Linear):
            raise InputError("a kernel is used by other than a convolution or product")
        source, factor, term = value.source, value.factor, value.term
        if isinstance(source, _Product):
            # The bias of a quantized kernel is not given to the node: ONNX Runtime
            # would round it to whole steps of the integer sum, which are coarse at few
            # bits. It is an Add of its own.
            in_node = source.operator != "MatMul" and not isinstance(
                source.kernel.values, Kernel
            )
            x = self._product(source, factor, term if in_node else np.float32(0))
            factor, term = np.float32(1), np.float32(0) if in_node else term
        else:
            x = self.tensor(source, order)
        for operator, operand, neutral in (("Mul", factor, 1), ("Add", term, 0)):
            if np.any(operand != neutral):
                x = self.elementwise(operator, [x, np.asarray(operand)], x.shape)
        return x

    def _quantizer(self, value: _Quantized, x: Tensor) -> Tensor:
        key = x.name, value.parameters, value.whole_bytes
        if key not in self._emitted:
            made = self.graph.quantizer(
                x, value.parameters, whole_bytes=value.whole_bytes
            )
            self._emitted[key] = value, made
        _, made = self._emitted[key]
        return Tensor(made.name, x.shape, x.order)

    def _product(self, product: _Product, factor: Any, bias: Any) -> Tensor:
        by, named = product.per_channel(np.asarray(factor)), product.kernel
        if isinstance(named.values, Kernel):
            kernel = self.graph.kernel(named.name, named.values.scaled(by))
        else:
            by = by.reshape(-1, *[1] * (named.values.ndim - 1))
            kernel = self.graph.constant(named.values * by, named.name)
        stored = [product.shape[axis] for axis in product.order]
        rank = len(stored)
        if product.operator == "Gemm":
            rank = 2
        elif product.operator == "MatMul":
            # ONNX knows one axis of scales: the kernel becomes matrices behind them.
            batches = product.batches
            rank = len(batches) + 2
            sizes = (*batches, -1, named.shape[-1])
            kernel = self._node_reshape(kernel, sizes).name
            perm = (*range(rank - 2), rank - 1, rank - 2)
            kernel = self.graph.node("Transpose", [kernel], sizes, perm=perm).name
        inputs = [product.x, kernel]
        if np.any(bias != 0):
            inputs.append(self.graph.constant(product.per_channel(np.asarray(bias))))
        x = self.graph.node(
            product.operator,
            inputs,
            product.shape,
            product.order,
            **product.attributes,
        )
        if rank != len(stored):
            x = self._node_reshape(x.name, self._open(stored))
        if isinstance(named.values, Kernel):
            self._bare[x.name] = named.values.bits
        return Tensor(x.name, product.shape, product.order)

    def _reshape(
        self, x: Tensor, shape: tuple[int, ...], order: tuple[int, ...] | None
    ) -> Tensor:
        kept = x.reshaped_order(shape)
        if kept is None:
            x, kept = self.tensor(x, range(len(x.shape))), tuple(range(len(shape)))

        def long(axes: Sequence[int]) -> list[int]:
            return [axis for axis in axes if shape[axis] != 1]

        if order is not None and long(order) == long(kept):
            kept = order  # axes of length 1 may lie anywhere
        stored = tuple(shape[axis] for axis in kept)
        if stored == x.stored:
            return Tensor(x.name, shape, kept)
        sizes = self._open(stored, x.stored)
        return Tensor(self._node_reshape(x.name, sizes).name, shape, kept)

    def _node_reshape(self, name: str, sizes: Sequence[int]) -> Tensor:
        constant = self.graph.constant(np.asarray(sizes, np.int64))
        return self.graph.node("Reshape", [name, constant], tuple(sizes))

    # Operations that several rules share.

    def elementwise(
        self, operator: str, values: Sequence[Any], shape: tuple[int, ...]
    ) -> Tensor:
        """Adds a node that computes element by element, in the largest one's order."""

        def rank(value: Any) -> tuple[int, bool]:
            return math.prod(value.shape), not isinstance(value, _Reshaped)

        no_arrays = [value for value in values if not isinstance(value, np.ndarray)]
        order = self.tensor(max(no_arrays, key=rank)).order
        names = [self._operand(value, order) for value in values]
        made = self.graph.node(operator, names, shape, order)
        if operator == "Relu" and names[0] in self._bare:
            self._bare[made.name] = self._bare[names[0]]
        return made

    def _operand(self, value: Any, order: tuple[int, ...]) -> str:
        if not isinstance(value, np.ndarray):
            return self.tensor(value, order).name
        value = self._compact(value)
        return self.graph.constant(value.transpose(order) if value.ndim else value)

    def slice(
        self,
        x: Any,
        starts: Sequence[int],
        limits: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> Tensor:
        """JAX's slice."""
        x = self.tensor(x)
        columns = zip(starts, limits, steps or [1] * len(starts), strict=True)
        rows = [
            (begin, end, axis, step)
            for axis, (begin, end, step) in enumerate(columns)
            if (begin, end, step) != (0, x.shape[axis], 1)
        ]
        shape = list(x.shape)
        for begin, end, axis, step in rows:
            if self.is_batch(x.shape[axis]):
                raise _refuse("a part of the batch")
            shape[axis] = len(range(begin, end, step))
        if not rows:
            return x
        begins, ends, axes, strides = zip(*rows, strict=True)
        columns = [begins, ends, x.axes(axes), strides]
        names = [self.graph.constant(np.asarray(c, np.int64)) for c in columns]
        return self.graph.node("Slice", [x.name, *names], tuple(shape), x.order)

    def pad(
        self, x: Any, before: Sequence[int], after: Sequence[int], value: Any = _ZERO
    ) -> Tensor:
        """JAX's pad, without values between those of x."""
        x = self.tensor(x)
        both = list(zip(before, after, strict=True))
        sizes = zip(x.shape, both, strict=True)
        if any(self.is_batch(size) and ends != (0, 0) for size, ends in sizes):
            raise _refuse("a padding of the batch")
        if min(*before, *after) < 0:
            raise _refuse("a negative padding")
        shape = tuple(n + sum(ends) for n, ends in zip(x.shape, both, strict=True))
        pads = [both[axis][end] for end in (0, 1) for axis in x.order]
        arrays = np.asarray(pads, np.int64), np.asarray(value)
        names = [x.name, *map(self.graph.constant, arrays)]
        return self.graph.node("Pad", names, shape, x.order)

    def dilated(self, x: Any, gaps: Sequence[int], value: Any = _ZERO) -> Any:
        """X with a number of further values between those along each axis."""
        for axis, gap in enumerate(gaps):
            if gap:
                shape = list(x.shape)
                before, after = [0] * (len(shape) + 1), [0] * (len(shape) + 1)
                after[axis + 1] = gap
                x = self.reshaped(x, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
                x = self.pad(x, before, after, value)
                shape[axis] *= gap + 1
                limits = [n - gap if a == axis else n for a, n in enumerate(shape)]
                x = self.slice(self.reshaped(x, shape), [0] * len(shape), limits)
        return x

    # The batch, whose size is open in the graph.

    def is_batch(self, size: int) -> bool:
        """Whether an axis of a length holds the images."""
        return size % self._batch == 0

    def batch_axis(self, shape: Sequence[int]) -> int:
        """The axis that holds the images.

        Raises:
          InputError: there is none.
        """
        axes = [axis for axis, size in enumerate(shape) if self.is_batch(size)]
        if len(axes) != 1:
            raise _refuse("a tensor without a batch")
        return axes[0]

    def _open(self, sizes: Sequence[int], before: Sequence[int] = ()) -> list[int]:
        """The sizes for a reshape: 0 for a batch that stays in its place, -1 else."""
        at = self.batch_axis(sizes)
        opened = list(sizes)
        opened[at] = 0 if tuple(before[at : at + 1]) == (sizes[at],) else -1
        return opened

    def _compact(self, array: np.ndarray) -> np.ndarray:
        """An array that is broadcast: length 1 where it can, a scalar if everywhere."""
        for axis, size in enumerate(array.shape):
            first = array.take([0], axis)
            if size > 1 and (array == first).all():
                array = first
            elif self.is_batch(size):
                raise _refuse("a constant that differs from image to image")
        return array.reshape(()) if array.size == 1 else array

    def repeated(self, array: np.ndarray, like: Tensor) -> Tensor:
        """An array as an edge that holds it for each image of another edge."""
        at, open_at = (
            self.batch_axis(array.shape),
            like.axes([self.batch_axis(like.shape)]),
        )
        if array.shape[at] != self._batch or like.stored[open_at[0]] != self._batch:
            raise _refuse("a constant that differs from image to image")
        graph = self.graph
        sizes = graph.node("Shape", [like.name], (len(like.shape),))
        index = graph.constant(np.asarray(open_at, np.int64))
        batch = graph.node("Gather", [sizes.name, index], (1,))
        parts = [
            np.asarray(part, np.int64)
            for part in (array.shape[:at], array.shape[at + 1 :])
        ]
        names = [graph.constant(parts[0]), batch.name, graph.constant(parts[1])]
        shape = graph.node("Concat", names, (array.ndim,), axis=0)
        small = graph.constant(self._compact(array))
        return graph.node("Expand", [small, shape.name], array.shape)


# Rules: (translator, equation, values of its inputs) -> the value of its output.


def _shape(equation: Equation) -> tuple[int, ...]:
    return equation.outputs[0].shape


def _node(operator: str) -> Callable[..., Any]:
    """A node that computes element by element."""

    def rule(translator, equation, *values):
        return translator.elementwise(operator, values, _shape(equation))

    return rule


def _arithmetic(operator: str) -> Callable[..., Any]:
    """Add, Sub, Mul or Div; with a constant it joins a `_Linear`."""

    def rule(translator, equation, a, b):
        shape = _shape(equation)
        if operator in ("Add", "Mul") and isinstance(a, np.ndarray):
            a, b = b, a
        is_float = equation.outputs[0].aval.dtype == np.float32
        if is_float and isinstance(b, np.ndarray) and a.shape == shape:
            if operator in ("Add", "Sub"):
                return translator.linear(a, plus=b if operator == "Add" else -b)
            by = b if operator == "Mul" else np.float32(1) / b
            return translator.linear(a, by)
        if operator == "Sub" and isinstance(b, _Linear) and isinstance(a, np.ndarray):
            if b.shape == shape:
                return translator.linear(b, np.float32(-1), a)
        return translator.elementwise(operator, (a, b), shape)

    return rule


def _formula(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Several such nodes, which `then(operator, *values)` adds."""

    def rule(translator, equation, *values):
        def then(operator, *values):
            return translator.elementwise(operator, values, _shape(equation))

        return formula(then, *values)

    return rule


def _negative(translator, equation, x):
    if isinstance(x, _Linear):
        return translator.linear(x, -1)
    return translator.elementwise("Neg", [x], _shape(equation))


def _same(translator, equation, x):
    return x


def _max(translator, equation, a, b):
    if isinstance(a, np.ndarray):
        a, b = b, a
    if isinstance(b, np.ndarray) and not b.any():
        return translator.elementwise("Relu", [a], _shape(equation))
    if isinstance(b, np.ndarray) and (b == -np.inf).all():  # jnp.max's start
        return a
    return translator.elementwise("Max", (a, b), _shape(equation))


def _power(translator, equation, x):
    exponent = np.asarray(equation.params["y"], np.float32)
    return translator.elementwise("Pow", (x, exponent), _shape(equation))


def _select(translator, equation, which, *cases):
    if len(cases) != 2:
        raise _refuse("a selection of several")
    if isinstance(which, np.ndarray) and which.size == 1:
        return cases[int(which.reshape(()))]
    return translator.elementwise("Where", (which, *cases[::-1]), _shape(equation))


def _logical(operator: str) -> Callable[..., Any]:
    def rule(translator, equation, *values):
        if equation.outputs[0].aval.dtype != bool:
            raise _refuse("an operation on bits")
        return translator.elementwise(operator, values, _shape(equation))

    return rule


def _convert(translator, equation, x):
    dtype, old = equation.outputs[0].aval.dtype, equation.inputs[0].aval.dtype
    if dtype == old:
        return x
    if dtype not in (np.float32, np.int32, np.bool_):
        raise InputError(f"the network computes in {dtype}: no ONNX rule")
    x = translator.tensor(x)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return translator.graph.node("Cast", [x.name], x.shape, x.order, to=kind)


def _convolution(translator, equation, x, kernel):
    params = equation.params
    numbers, padding = params["dimension_numbers"], params["padding"]
    if params["batch_group_count"] != 1 or min(map(min, padding), default=0) < 0:
        raise _refuse("a convolution")
    gaps = [0] * len(x.shape)
    for axis, step in zip(numbers.lhs_spec[2:], params["lhs_dilation"], strict=True):
        gaps[axis] = step - 1
    # A transposed convolution: ONNX's would have its output channels in another place.
    x = translator.tensor(translator.dilated(x, gaps), numbers.lhs_spec)
    named = _named(translator, kernel)
    out, *inner = numbers.rhs_spec
    attributes = {
        "strides": params["window_strides"],
        "pads": [int(ends[i]) for i in (0, 1) for ends in padding],
        "dilations": params["rhs_dilation"],
        "group": params["feature_group_count"],
    }
    return translator.linear(
        _Product(
            "Conv",
            x.name,
            _Kernel(named.name, features_first(named.values, [out], inner)),
            _shape(equation),
            numbers.out_spec,
            numbers.out_spec[1:2],
            attributes=attributes,
        )
    )


def _named(translator, kernel):
    """A kernel with a name, for a constant gets one."""
    if isinstance(kernel, np.ndarray):
        kernel = _Kernel(f"kernel_{len(translator.graph.constants)}", kernel)
    if not isinstance(kernel, _Kernel):
        raise _refuse("a kernel that depends on the image")
    return kernel


def _matrices(translator, x, kept, rows, columns):
    """X with the axes that are kept in front, the rows' in one and the columns'."""
    sizes = (
        *(x.shape[axis] for axis in kept),
        math.prod(x.shape[axis] for axis in rows),
        math.prod(x.shape[axis] for axis in columns),
    )
    moved = translator.permuted(x, (*kept, *rows, *columns))
    return translator.tensor(translator.reshaped(moved, sizes), range(len(sizes)))


def _dot(translator, equation, *operands):
    contracting, batch = equation.params["dimension_numbers"]
    shape, count = _shape(equation), len(batch[0])
    free = [
        [a for a in range(len(x.shape)) if a not in (*contracting[i], *batch[i])]
        for i, x in enumerate(operands)
    ]
    sides = [i for i, x in enumerate(operands) if isinstance(x, np.ndarray | _Kernel)]
    if not sides:
        a = _matrices(translator, operands[0], batch[0], free[0], contracting[0])
        b = _matrices(translator, operands[1], batch[1], contracting[1], free[1])
        whole = (*a.shape[:-1], b.shape[-1])
        made = translator.graph.node("MatMul", [a.name, b.name], whole)
        return translator.reshaped(made, shape)
    (side,) = sides
    other, named = 1 - side, _named(translator, operands[side])
    if any(map(translator.is_batch, named.shape)):
        raise _refuse("a kernel for each image")
    x = _matrices(
        translator, operands[other], batch[other], free[other], contracting[other]
    )
    # Where the axes are in the result: the left operand's, then the right one's.
    middle = count + len(free[0])
    places = (range(count, middle), range(middle, len(shape)))
    kernel = features_first(
        named.values, (*batch[side], *free[side]), contracting[side], flat=True
    )
    # The kernel as [out, in]: of [in, out] ONNX Runtime makes a product of its own,
    # with activations rounded to 8 bits.
    return translator.linear(
        _Product(
            "MatMul" if count else "Gemm",
            x.name,
            _Kernel(named.name, kernel),
            shape,
            (*range(count), *places[other], *places[side]),
            (*range(count), *places[side]),
            x.shape[:count],
            {} if count else {"transB": 1},
        )
    )


def _reduce(operator: str) -> Callable[..., Any]:
    def rule(translator, equation, x):
        x, axes = translator.tensor(x), sorted(equation.params["axes"])
        if any(translator.is_batch(x.shape[axis]) for axis in axes):
            raise _refuse("a result over the batch")
        kept = [axis for axis in x.order if axis not in axes]
        order = [sorted(kept).index(axis) for axis in kept]
        where = translator.graph.constant(np.asarray(sorted(x.axes(axes)), np.int64))
        return translator.graph.node(
            operator, [x.name, where], _shape(equation), order, keepdims=0
        )

    return rule


def _pad(translator, equation, x, value):
    if not isinstance(value, np.ndarray):
        raise _refuse("a padding with an activation")
    before, after, inside = zip(*equation.params["padding_config"], strict=True)
    return translator.pad(translator.dilated(x, inside, value), before, after, value)


def _slice(translator, equation, x):
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    return translator.slice(x, starts, limits, params["strides"])


def _dynamic_slice(translator, equation, x, *starts):
    if not all(isinstance(start, np.ndarray) for start in starts):
        raise _refuse("a slice whose place depends on the image")
    sizes = equation.params["slice_sizes"]
    most = np.subtract(x.shape, sizes)
    first = np.clip(np.asarray(starts, int), 0, most)
    return translator.slice(x, first.tolist(), (first + sizes).tolist())


def _reverse(translator, equation, x):
    back = equation.params["dimensions"]
    starts = [size - 1 if a in back else 0 for a, size in enumerate(x.shape)]
    limits = [-size - 1 if a in back else size for a, size in enumerate(x.shape)]
    return translator.slice(
        x, starts, limits, [-1 if a in back else 1 for a in range(len(x.shape))]
    )


def _split(translator, equation, x):
    axis, begin, found = equation.params["axis"], 0, []
    for size in map(int, equation.params["sizes"]):
        starts, limits = [0] * len(x.shape), list(x.shape)
        starts[axis], limits[axis] = begin, begin + size
        found.append(translator.slice(x, starts, limits))
        begin += size
    return found


def _gather(translator, equation, x, indices):
    """Only that of whole slices along one axis."""
    numbers = equation.params["dimension_numbers"]
    axes = numbers.start_index_map
    (axis,) = axes if len(axes) == 1 else (0,)
    shape, sizes = _shape(equation), list(x.shape)
    sizes[axis] = 1
    places = [a for a in range(len(shape)) if a not in numbers.offset_dims]
    if (
        not isinstance(indices, np.ndarray)
        or len(axes) != 1
        or tuple(numbers.collapsed_slice_dims) != tuple(axes)
        or list(equation.params["slice_sizes"]) != sizes
        or places != [axis]
        or ((indices < 0) | (indices >= x.shape[axis])).any()
        or translator.is_batch(x.shape[axis])
    ):
        raise _refuse("a gather")
    x = translator.tensor(x)
    where = translator.graph.constant(indices.reshape(-1).astype(np.int64))
    (at,) = x.axes([axis])
    return translator.graph.node("Gather", [x.name, where], shape, x.order, axis=at)


def _transpose(translator, equation, x):
    return translator.permuted(x, equation.params["permutation"])


def _reshape(translator, equation, x):
    if equation.name == "reshape" and equation.params["dimensions"] is not None:
        raise _refuse("a reshape of a transpose")
    return translator.reshaped(x, _shape(equation))


def _broadcast(translator, equation, x):
    shape, dims = _shape(equation), equation.params["broadcast_dimensions"]
    sizes = [1] * len(shape)
    for axis, size in zip(dims, x.shape, strict=True):
        sizes[axis] = size
    x = translator.reshaped(x, sizes)
    if tuple(sizes) == shape:
        return x
    x = translator.tensor(x)
    # Sizes of 1 stay as they are: the batch among them.
    wanted = [1 if sizes[a] == shape[a] else shape[a] for a in x.order]
    names = [x.name, translator.graph.constant(np.asarray(wanted, np.int64))]
    return translator.graph.node("Expand", names, shape, x.order)


def _tile(translator, equation, x):
    x, reps = translator.tensor(x), equation.params["reps"]
    if reps[translator.batch_axis(x.shape)] != 1:
        raise _refuse("a repeated batch")
    repeats = np.asarray([reps[axis] for axis in x.order], np.int64)
    names = [x.name, translator.graph.constant(repeats)]
    return translator.graph.node("Tile", names, _shape(equation), x.order)


def _concatenate(translator, equation, *parts):
    axis, shape = equation.params["dimension"], _shape(equation)
    if translator.is_batch(shape[axis]):
        raise _refuse("a batch that is put together")
    edges = [part for part in parts if not isinstance(part, np.ndarray)]
    first = translator.tensor(max(edges, key=lambda part: math.prod(part.shape)))
    names = [
        translator.tensor(
            translator.repeated(part, first) if isinstance(part, np.ndarray) else part,
            first.order,
        ).name
        for part in parts
    ]
    (at,) = first.axes([axis])
    return translator.graph.node("Concat", names, shape, first.order, axis=at)


def _stack(translator, equation, *parts):
    axis = equation.params["axis"]
    one = (*_shape(equation)[:axis], 1, *_shape(equation)[axis + 1 :])
    parts = [
        part.reshape(one)
        if isinstance(part, np.ndarray)
        else translator.reshaped(part, one)
        for part in parts
    ]
    params = {"dimension": axis}
    return _concatenate(
        translator, dataclasses.replace(equation, params=params), *parts
    )


def _unstack(translator, equation, x):
    axis = equation.params["axis"]
    sizes = {"axis": axis, "sizes": [1] * x.shape[axis]}
    parts = _split(translator, dataclasses.replace(equation, params=sizes), x)
    return [translator.reshaped(part, _shape(equation)) for part in parts]


def _window(translator, equation, x):
    """A pooling's input with channels first, and its attributes."""
    params = equation.params
    sizes, strides = params["window_dimensions"], params["window_strides"]
    padding = [tuple(map(int, ends)) for ends in params["padding"]]
    x = translator.tensor(x)
    batch = translator.batch_axis(x.shape)
    plain = [
        axis
        for axis in x.order
        if (sizes[axis], strides[axis], padding[axis]) == (1, 1, (0, 0))
    ]
    channels = [axis for axis in plain if axis != batch]
    if batch not in plain or not channels or set(params["base_dilation"]) != {1}:
        raise _refuse("a pooling")
    first = batch, channels[0]
    spatial = [axis for axis in x.order if axis not in first]
    x = translator.tensor(x, (*first, *spatial))
    return x, {
        "kernel_shape": [sizes[axis] for axis in spatial],
        "strides": [strides[axis] for axis in spatial],
        "pads": [padding[axis][end] for end in (0, 1) for axis in spatial],
        "dilations": [params["window_dilation"][axis] for axis in spatial],
    }


def _max_pool(translator, equation, x):
    x, window = _window(translator, equation, x)
    return translator.graph.node(
        "MaxPool", [x.name], _shape(equation), x.order, **window
    )


def _sum_pool(translator, equation, x):
    """A mean times the window's size: ONNX has no sum. Padding counts as zeros."""
    x, window = _window(translator, equation, x)
    if set(window.pop("dilations")) != {1}:
        raise _refuse("a pooling")
    mean = translator.graph.node(
        "AveragePool",
        [x.name],
        _shape(equation),
        x.order,
        count_include_pad=1,
        **window,
    )
    return translator.linear(mean, np.float32(math.prod(window["kernel_shape"])))


_NODES = {
    **{"abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin"},
    **{"asinh": "Asinh", "atan": "Atan", "atanh": "Atanh", "ceil": "Ceil"},
    **{"cos": "Cos", "cosh": "Cosh", "eq": "Equal", "erf": "Erf", "exp": "Exp"},
    **{"floor": "Floor", "ge": "GreaterOrEqual", "gt": "Greater"},
    **{"le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less"},
    **{"min": "Min", "pow": "Pow", "sign": "Sign", "sin": "Sin", "sinh": "Sinh"},
    **{"sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh"},
}
# They give values of their first operand, or the largest of some.
_MOVING = frozenset(
    {"broadcast_in_dim", "dynamic_slice", "expand_dims", "gather", "reduce_max"}
    | {"reduce_window_max", "reshape", "rev", "slice", "split", "squeeze", "tile"}
    | {"transpose", "unstack"}
)
_RULES: dict[str, Callable[..., Any]] = {
    **{name: _node(operator) for name, operator in _NODES.items()},
    **{name: _logical(name.title()) for name in ("and", "or", "xor", "not")},
    "add": _arithmetic("Add"),
    "add_any": _arithmetic("Add"),
    "sub": _arithmetic("Sub"),
    "mul": _arithmetic("Mul"),
    "div": _arithmetic("Div"),
    "neg": _negative,
    "max": _max,
    "integer_pow": _power,
    "select_n": _select,
    "clamp": _formula(lambda then, a, x, b: then("Min", then("Max", x, a), b)),
    "erfc": _formula(lambda then, x: then("Sub", _ONE, then("Erf", x))),
    "expm1": _formula(lambda then, x: then("Sub", then("Exp", x), _ONE)),
    "is_finite": _formula(lambda then, x: then("Equal", then("Sub", x, x), _ZERO)),
    "log1p": _formula(lambda then, x: then("Log", then("Add", x, _ONE))),
    "ne": _formula(lambda then, a, b: then("Not", then("Equal", a, b))),
    "rsqrt": _formula(lambda then, x: then("Reciprocal", then("Sqrt", x))),
    "square": _formula(lambda then, x: then("Mul", x, x)),
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _sum_pool,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "tile": _tile,
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _reverse,
    "split": _split,
    "gather": _gather,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
}
