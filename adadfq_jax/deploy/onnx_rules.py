"""Translation of a traced network into an ONNX graph: a rule for each primitive.

Values that depend on constants alone are computed here. Factors and terms per channel
are collected (`Linear`) until a nonlinearity follows. Those of batch norms thus become
part of the scales of the kernel before them and of the convolution's bias, at no cost.

Shapes and axes are JAX's, for the traced batch, whose length no other axis has. The
order of a `Tensor` says where its axes lie in the graph. Convolutions and pools need
channels first; all other rules keep the order of their input where they can.
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
from adadfq_jax.deploy.onnx_graph import (
    Graph,
    IntegerGraph,
    Tensor,
    features_first,
    no_rule,
)
from adadfq_jax.deploy.onnx_values import (
    KernelOperand,
    Linear,
    Product,
    Quantized,
    Reshaped,
)
from adadfq_jax.errors import InputError
from adadfq_jax.network import Graph as Network
from adadfq_jax.network.graph import Places
from adadfq_jax.network.program import Constant, Equation, Operand, inside

_ONE, _ZERO = np.ones((), np.float32), np.zeros((), np.float32)


def translate(
    graph: Graph,
    network: Network,
    images: Tensor,
    *,
    variables: Mapping[str, Any],
    kernels: Mapping[str, Kernel | np.ndarray],
    ranges: Mapping[str, Any],
) -> Tensor:
    """Add a network to an ONNX graph.

    Args:
      graph: gets the nodes.
      network: result of `trace`.
      images: normalised, [network.traced_batch, ...] in the network's layout.
      variables: by name; those from which only `kernels` are computed may be missing.
      kernels: by name, as integers or float32, in the shapes that their operations
        read; a missing kernel is computed from the variables.
      ranges: a `Range` of each activation, by name, or the two ends of it in an
        `IntegerGraph`; an activation without one stays in float32.

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
    translator = _Translator(graph, quantized)
    equations = _with_kernels(places, network, kernels)
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
    """Add (images / 255 - mean) / std for uint8 pixels.

    Args:
      graph: gets the nodes.
      images: uint8.
      mean: of each channel.
      std: likewise.
      channels: axis of the channels in `images.shape`, as JAX has it.
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
    """Return the equations of the logits, with a `KernelOperand` per given kernel."""
    replaced: dict[tuple[int, int], Operand] = {}
    for at, place in places.kernels.items():
        entry = network.kernels[place]
        if entry.name in kernels:
            replaced[at] = Constant(KernelOperand(entry.variable, kernels[entry.name]))
    found = []
    for index in places.needed([places.program.output], replaced=replaced):
        equation = places.program.equations[index]
        operands = enumerate(equation.inputs)
        inputs = tuple(replaced.get((index, side), x) for side, x in operands)
        found.append(dataclasses.replace(equation, inputs=inputs))
    return found


class _Translator:
    """The evaluator of equations on constants, kernels and edges of a graph.

    A value is an array, a `KernelOperand`, a `Tensor`, or a value that is not in the
    graph yet: `Linear`, `Quantized` or `Reshaped`.

    Args:
      graph: gets the nodes.
      quantized: the ranges of the values that are quantized.
    """

    def __init__(self, graph: Graph, quantized: Mapping[Any, Any]):
        self.graph = graph
        self._ranges = quantized
        self._values: dict[Any, Any] = {}
        self._uses: collections.Counter[Any] = collections.Counter()
        self._emitted: dict[Any, tuple[Any, Tensor]] = {}
        self._byte_edges: set[str] = set()  # edges whose codes take a byte each
        # Edges of products without a bias -> bits of the kernel.
        self._unbiased_bits: dict[str, int] = {}

    # Evaluation.

    def run(self, equations: Sequence[Equation], outputs: Sequence[Any]) -> list[Any]:
        """Evaluate equations; return the values of the outputs."""
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
        """Set what stands for a value of the program, quantized if it has a range."""
        parameters = self._ranges.get(value)
        if parameters is not None:
            if value.aval.dtype != np.float32:
                raise no_rule(f"an activation of {value.aval.dtype}")
            if isinstance(self.graph, IntegerGraph):
                found = self._values[value] = self.tensor(found)
                self.graph.ranges.setdefault(found.name, parameters)
                return
            found = Quantized(
                self._with_separate_add(self.tensor(found), parameters), parameters
            )
        self._values[value] = found

    def _with_separate_add(self, x: Tensor, parameters: Range) -> Tensor:
        """Add zeros to a product without a bias that is to be quantized.

        Otherwise ONNX Runtime fuses the product with the quantizer after it, and then
        refuses codes of less than 8 bits. It would remove an Add of a single zero, so
        that the zeros have the length of the longest axis.
        """
        bits = self._unbiased_bits.get(x.name)
        if bits is None or min(bits, parameters.bits) == 8:
            return x
        batch = self.graph.batch_axis(x.shape)
        long = max(set(range(len(x.shape))) - {batch}, key=lambda axis: x.shape[axis])
        sizes = [x.shape[axis] if axis == long else 1 for axis in x.order]
        return self.graph.apply("Add", x, np.zeros(sizes, np.float32))

    def _get(self, operand: Any) -> Any:
        if isinstance(operand, Constant):
            array = operand.array
            return array if isinstance(array, KernelOperand) else np.asarray(array)
        if operand not in self._values:
            raise InputError("variables: some that the network needs are missing")
        found = self._values[operand]
        if isinstance(found, Linear) and self._uses[operand] > 1:
            # Several readers share one product: their factors must not duplicate it.
            found = self._values[operand] = self.tensor(found)
        return found

    def _evaluate(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        if all(isinstance(value, np.ndarray) for value in inputs):
            return [np.asarray(value) for value in equation.evaluate(inputs)]
        if equation.name in _RULES:
            rule, (x, *others) = _RULES[equation.name], inputs
            moved = equation.name in _MOVING and isinstance(x, Quantized)
            found = rule(self, equation, x.x if moved else x, *others)
            several = found if equation.primitive.multiple_results else [found]
            if not moved:
                return several
            # The rule only moves or selects values, so that its quantizer may follow
            # it, next to the reader. ONNX Runtime pools codes, but not those of 4 bits.
            pooled = equation.name == "reduce_window_max"
            whole_bytes = x.whole_bytes or pooled
            return [Quantized(y, x.parameters, whole_bytes) for y in several]
        within = inside(equation)
        if within is None:
            raise no_rule(repr(equation.name))
        self._uses.subtract(equation.inputs)  # the inner equations' uses count instead
        return self.run(*within)

    # Values that are not in the graph yet.

    def linear(self, x: Any, by: Any = 1, plus: Any = 0) -> Linear:
        """Return x * by + plus, where `by` and `plus` broadcast to x.

        Raises:
          InputError: `by` or `plus` differs from image to image of a batch.
        """
        by, plus = (self.graph.compact(np.asarray(v, np.float32)) for v in (by, plus))
        old = x if isinstance(x, Linear) else Linear(x, _ONE, _ZERO)
        if isinstance(old.source, Product) and not (
            old.source.takes(by) and old.source.takes(plus)
        ):
            old = Linear(self.tensor(x), _ONE, _ZERO)
        factor, term = map(np.asarray, (old.factor * by, old.term * by + plus))
        return Linear(old.source, factor, term)

    def reshaped(self, x: Any, shape: Iterable[int]) -> Any:
        """Reshape as JAX does; the node is added when the value is read."""
        shape = tuple(int(size) for size in shape)
        if isinstance(x, Quantized):
            return dataclasses.replace(x, x=self.reshaped(x.x, shape))
        if (
            isinstance(x, Linear)
            and x.factor.size == x.term.size == 1
            and not isinstance(x.source, Product)
        ):
            ends = (values.reshape(()) for values in (x.factor, x.term))
            return Linear(self.reshaped(x.source, shape), *ends)
        source = x.source if isinstance(x, Reshaped) else x
        return source if source.shape == shape else Reshaped(source, shape)

    def permuted(self, x: Any, permutation: Sequence[int]) -> Any:
        """Transpose as JAX does, by the order alone, without a node."""
        permutation = tuple(int(axis) for axis in permutation)
        if isinstance(x, Quantized):
            return dataclasses.replace(x, x=self.permuted(x.x, permutation))
        if isinstance(x, Linear) and isinstance(x.source, Product | Tensor):
            both = (
                values.transpose(permutation) if values.ndim else values
                for values in (x.factor, x.term)
            )
            return Linear(x.source.permuted(permutation), *both)
        return self.tensor(x).permuted(permutation)

    # Edges of the graph.

    def tensor(self, value: Any, order: Sequence[int] | None = None) -> Tensor:
        """Return the value as an edge of the graph, which is added on the first call.

        Args:
          value: any value but an array.
          order: the order that the edge must have, or None for any.

        Raises:
          InputError: the value is a kernel.
        """
        if isinstance(value, Tensor):
            found = value
        else:
            if id(value) not in self._emitted:
                self._emitted[id(value)] = value, self._emit(value, order)
            _, found = self._emitted[id(value)]
        return found if order is None else self.graph.transposed(found, order)

    def _emit(self, value: Any, order: Sequence[int] | None) -> Tensor:
        if isinstance(value, Quantized):
            return self._quantizer(value, self.tensor(value.x, order))
        if isinstance(value, Reshaped):
            return self.graph.reshaped(self.tensor(value.source), value.shape, order)
        if not isinstance(value, Linear):
            raise InputError("a kernel is used by other than a convolution or product")
        source, factor, term = value.source, value.factor, value.term
        if isinstance(source, Product):
            # The bias of a quantized kernel is an Add of its own. Inside the node, ONNX
            # Runtime would round it to whole steps of the integer sum, which are coarse
            # at few bits.
            in_node = source.operator != "MatMul" and (
                isinstance(self.graph, IntegerGraph)
                or not isinstance(source.kernel.values, Kernel)
            )
            x = self._product(source, factor, term if in_node else _ZERO)
            factor, term = _ONE, _ZERO if in_node else term
        else:
            x = self.tensor(source, order)
        # A mean is a mean over all places times their number, divided by it again.
        if factor.size == 1 and abs(factor - 1) < 2**-22:
            factor = _ONE
        for operator, operand, neutral in (("Mul", factor, 1), ("Add", term, 0)):
            if np.any(operand != neutral):
                x = self.elementwise(operator, [x, operand], x.shape)
        return x

    def _quantizer(self, value: Quantized, x: Tensor) -> Tensor:
        key = x.name, value.parameters, value.whole_bytes
        if key not in self._emitted:
            made = self.graph.quantizer(
                x, value.parameters, whole_bytes=value.whole_bytes
            )
            self._emitted[key] = value, made
            if value.whole_bytes or value.parameters.bits > 4:
                self._byte_edges.add(made.name)
        _, made = self._emitted[key]
        return Tensor(made.name, x.shape, x.order)

    def _product(
        self, product: Product, factor: np.ndarray, bias: np.ndarray
    ) -> Tensor:
        by, named = product.per_channel(factor), product.kernel
        values, bits = named.values, None
        if isinstance(values, Kernel):
            # ONNX Runtime multiplies codes of a byte by kernels of 4 or 8 bits alone.
            least_bits, bits = 4 if product.x in self._byte_edges else 2, values.bits
            kernel = self.graph.kernel(named.name, values.scaled(by), least_bits)
        else:
            by = by.reshape(-1, *[1] * (values.ndim - 1))
            kernel = self.graph.constant(values * by, named.name)
        stored = tuple(product.shape[axis] for axis in product.order)
        shape, batches = stored, product.batches
        if product.operator == "Gemm":
            shape = (math.prod(stored) // by.size, by.size)
        elif product.operator == "MatMul":
            # ONNX has one axis of scales, so that the kernel is split into matrices
            # after its scales are applied.
            count, (out, inner) = len(batches), named.shape
            out //= math.prod(batches)
            shape = (*batches, math.prod(stored) // out // math.prod(batches), out)
            sizes = np.asarray((*batches, out, inner), np.int64)
            x = self.graph.apply("Reshape", Tensor(kernel, tuple(sizes)), sizes)
            perm = (*range(count), count + 1, count)
            kernel = self.graph.apply("Transpose", x, perm=perm).name
        inputs = [product.x, kernel]
        if bias.any():
            inputs.append(self.graph.constant(product.per_channel(bias)))
        x = self.graph.node(product.operator, inputs, shape, **product.attributes)
        x = self.graph.reshaped(x, stored)
        if bits is not None:
            self._unbiased_bits[x.name] = bits
        return Tensor(x.name, product.shape, product.order)

    # Operations that several rules share.

    def _is_read_once(self, x: Tensor) -> bool:
        """Tell whether one operation alone reads a tensor, under any of its names."""
        for value, found in self._values.items():
            while isinstance(found, (Linear, Reshaped)):
                found = found.source
            is_x = isinstance(found, Tensor) and found.name == x.name
            if is_x and self._uses[value] > 1:
                return False
        return True

    def clip(self, x: Any, low: Any = None, high: Any = None) -> Tensor:
        """Clip x to two numbers; None stands for no end.

        A Relu that nothing else reads becomes part of the Clip.
        """
        if isinstance(x, Tensor) and low is None and self._is_read_once(x):
            before = self.graph.undo_relu(x) if high >= 0 else None
            if before is not None:
                x, low = before, _ZERO
        return self.graph.clipped(self.tensor(x), low, high)

    def elementwise(
        self, operator: str, values: Sequence[Any], shape: tuple[int, ...]
    ) -> Tensor:
        """Add a node that computes element by element, in the largest value's order."""

        def rank(value: Any) -> tuple[int, bool]:
            return math.prod(value.shape), not isinstance(value, Reshaped)

        no_arrays = [value for value in values if not isinstance(value, np.ndarray)]
        order = self.tensor(max(no_arrays, key=rank)).order
        names = [self._operand(value, order) for value in values]
        made = self.graph.node(operator, names, shape, order)
        if operator == "Relu" and names[0] in self._unbiased_bits:
            self._unbiased_bits[made.name] = self._unbiased_bits[names[0]]
        return made

    def _operand(self, value: Any, order: tuple[int, ...]) -> str:
        if not isinstance(value, np.ndarray):
            return self.tensor(value, order).name
        value = self.graph.compact(value)
        return self.graph.constant(value.transpose(order) if value.ndim else value)


# A rule maps (translator, equation, values of its inputs) to the value of its output.


def _shape(equation: Equation) -> tuple[int, ...]:
    return equation.outputs[0].shape


def _node(operator: str) -> Callable[..., Any]:
    """Make the rule of a single node that computes element by element."""
    return _formula(lambda then, *values: then(operator, *values))


def _formula(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Make the rule of several such nodes, which `then(operator, *values)` adds."""

    def rule(translator, equation, *values):
        def then(operator, *values):
            return translator.elementwise(operator, values, _shape(equation))

        return formula(then, *values)

    return rule


def _arithmetic(operator: str) -> Callable[..., Any]:
    """Make the rule of Add, Sub, Mul or Div; a constant becomes part of a `Linear`."""

    def rule(translator, equation, a, b):
        shape = _shape(equation)
        if operator in ("Add", "Mul") and isinstance(a, np.ndarray):
            a, b = b, a
        is_float = equation.outputs[0].aval.dtype == np.float32
        if is_float and isinstance(b, np.ndarray) and a.shape == shape:
            if operator in ("Add", "Sub"):
                return translator.linear(a, plus=b if operator == "Add" else -b)
            return translator.linear(a, by=b if operator == "Mul" else 1 / b)
        from_constant = isinstance(a, np.ndarray) and isinstance(b, Linear)
        if operator == "Sub" and from_constant and b.shape == shape:
            return translator.linear(b, by=-1, plus=a)
        return translator.elementwise(operator, (a, b), shape)

    return rule


def _negative(translator, equation, x):
    if isinstance(x, Linear):
        return translator.linear(x, by=-1)
    return translator.elementwise("Neg", [x], _shape(equation))


def _max(translator, equation, a, b):
    if isinstance(a, np.ndarray):
        a, b = b, a
    if isinstance(b, np.ndarray) and not b.any():
        return translator.elementwise("Relu", [a], _shape(equation))
    if isinstance(b, np.ndarray) and (b == -np.inf).all():  # jnp.max's initial value
        return a
    return translator.elementwise("Max", (a, b), _shape(equation))


def _min(translator, equation, a, b):
    """Return min(a, b), a Clip if one of the two is a single number.

    ONNX Runtime fuses a Clip with the convolution before it, but not a Min.
    """
    if isinstance(a, np.ndarray):
        a, b = b, a
    if isinstance(b, np.ndarray) and b.size == 1 and b.dtype == np.float32:
        return translator.clip(a, high=b.reshape(()))
    return translator.elementwise("Min", (a, b), _shape(equation))


def _clamp(translator, equation, low, x, high):
    ends = [end for end in (low, high) if isinstance(end, np.ndarray) and end.size == 1]
    if len(ends) == 2 and not isinstance(x, np.ndarray) and low.dtype == np.float32:
        ends = [end.reshape(()) for end in ends]
        return translator.clip(x, *ends)
    larger = translator.elementwise("Max", (x, low), _shape(equation))
    return translator.elementwise("Min", (larger, high), _shape(equation))


def _power(translator, equation, x):
    exponent = np.asarray(equation.params["y"], np.float32)
    return translator.elementwise("Pow", (x, exponent), _shape(equation))


def _select(translator, equation, which, *cases):
    if len(cases) != 2:
        raise no_rule("a selection of several")
    if isinstance(which, np.ndarray) and which.size == 1:
        return cases[int(which.reshape(()))]
    return translator.elementwise("Where", (which, *cases[::-1]), _shape(equation))


def _logical(operator: str) -> Callable[..., Any]:
    def rule(translator, equation, *values):
        if equation.outputs[0].aval.dtype != bool:
            raise no_rule("an operation on bits")
        return translator.elementwise(operator, values, _shape(equation))

    return rule


def _same(translator, equation, x):
    return x


def _convert(translator, equation, x):
    dtype = np.dtype(equation.outputs[0].aval.dtype)
    if dtype == equation.inputs[0].aval.dtype:
        return x
    if dtype not in (np.float32, np.int32, np.bool_):
        raise InputError(f"the network computes in {dtype}: no ONNX rule")
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    return translator.graph.apply("Cast", translator.tensor(x), to=kind)


# Convolutions and products.


def _named(translator, kernel):
    """Return an operand as a kernel with a name; a constant gets a new name."""
    if isinstance(kernel, np.ndarray):
        kernel = KernelOperand(f"kernel_{len(translator.graph.constants)}", kernel)
    if not isinstance(kernel, KernelOperand):
        raise no_rule("a kernel that depends on the image")
    if any(map(translator.graph.is_batch, kernel.shape)):
        raise no_rule("a kernel for each image")
    return kernel


def _convolution(translator, equation, x, kernel):
    params, named = equation.params, _named(translator, kernel)
    numbers, padding = params["dimension_numbers"], params["padding"]
    if params["batch_group_count"] != 1 or min(map(min, padding), default=0) < 0:
        raise no_rule("a convolution over the batch or of a negative padding")
    x = translator.tensor(x, numbers.lhs_spec)
    # A transposed convolution is a Conv of the dilated input, because ONNX's
    # ConvTranspose has its output channels on another axis.
    gaps = [0] * len(x.shape)
    for axis, step in zip(numbers.lhs_spec[2:], params["lhs_dilation"], strict=True):
        gaps[axis] = step - 1
    x = translator.graph.dilated(x, gaps, _ZERO)
    out, *inner = numbers.rhs_spec
    product = Product(
        "Conv",
        translator.graph.transposed(x, numbers.lhs_spec).name,
        KernelOperand(named.name, features_first(named.values, [out], inner)),
        _shape(equation),
        order=numbers.out_spec,
        channels=numbers.out_spec[1:2],
        attributes={
            "strides": params["window_strides"],
            "pads": [int(ends[i]) for i in (0, 1) for ends in padding],
            "dilations": params["rhs_dilation"],
            "group": params["feature_group_count"],
        },
    )
    return translator.linear(product)


def _matrices(translator, x, kept, rows, columns):
    """Return an edge with the axes [*kept, rows, columns], the last two flattened."""
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
    sides = [
        i for i, x in enumerate(operands) if isinstance(x, np.ndarray | KernelOperand)
    ]
    if not sides:
        a = _matrices(translator, operands[0], batch[0], free[0], contracting[0])
        b = _matrices(translator, operands[1], batch[1], contracting[1], free[1])
        whole = (*a.shape[:-1], b.shape[-1])
        made = translator.graph.node("MatMul", [a.name, b.name], whole)
        return translator.reshaped(made, shape)
    (side,) = sides
    one, named = 1 - side, _named(translator, operands[side])
    x = _matrices(translator, operands[one], batch[one], free[one], contracting[one])
    outer = (*batch[side], *free[side])
    kernel = features_first(named.values, outer, contracting[side], flat=True)
    # The result has the left operand's axes before those of the right one.
    middle = count + len(free[0])
    places = (range(count, middle), range(middle, len(shape)))
    product = Product(
        "MatMul" if count else "Gemm",
        x.name,
        KernelOperand(named.name, kernel),
        shape,
        order=(*range(count), *places[one], *places[side]),
        channels=(*range(count), *places[side]),
        batches=x.shape[:count],
        # The kernel is [out, in]: ONNX Runtime would replace a product with [in, out]
        # by one of its own, which rounds activations to 8 bits.
        attributes={} if count else {"transB": 1},
    )
    return translator.linear(product)


# Reductions and pools.


def _reduce(operator: str) -> Callable[..., Any]:
    def rule(translator, equation, x):
        x, axes = translator.tensor(x), equation.params["axes"]
        if any(translator.graph.is_batch(x.shape[axis]) for axis in axes):
            raise no_rule("a result over the batch")
        kept = [axis for axis in x.order if axis not in axes]
        order = [sorted(kept).index(axis) for axis in kept]
        where = np.asarray(sorted(x.axes(axes)), np.int64)
        return translator.graph.apply(
            operator, x, where, shape=_shape(equation), order=order, keepdims=0
        )

    return rule


def _sum(translator, equation, x):
    """Return a sum; over all places of an image it is the mean times their number."""
    x, axes = translator.tensor(x), equation.params["axes"]
    kept = [axis for axis in x.order if axis not in axes]
    is_pool = len(axes) > 1 and len(kept) == 2 and x.order[:2] == tuple(kept)
    if not is_pool or not translator.graph.is_batch(x.shape[kept[0]]):
        return _reduce("ReduceSum")(translator, equation, x)
    sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    mean = translator.graph.apply("GlobalAveragePool", x, shape=tuple(sizes))
    mean = translator.reshaped(mean, _shape(equation))
    return translator.linear(mean, by=math.prod(x.shape[axis] for axis in axes))


def _pool(translator, equation, x, operator, **attributes):
    """Add a pooling, with the channels before the axes of the window."""
    params = equation.params
    sizes, strides = params["window_dimensions"], params["window_strides"]
    padding = [tuple(map(int, ends)) for ends in params["padding"]]
    x = translator.tensor(x)
    plain = [
        axis
        for axis in x.order
        if (sizes[axis], strides[axis], padding[axis]) == (1, 1, (0, 0))
    ]
    batch = translator.graph.batch_axis(x.shape)
    channels = [axis for axis in plain if axis != batch]
    if batch not in plain or not channels or set(params["base_dilation"]) != {1}:
        raise no_rule("a pooling over the batch, over all axes or of a dilated input")
    first = batch, channels[0]
    over = [axis for axis in x.order if axis not in first]
    dilations = [params["window_dilation"][axis] for axis in over]
    if set(dilations) != {1}:
        attributes["dilations"] = dilations
    return translator.graph.apply(
        operator,
        translator.graph.transposed(x, (*first, *over)),
        shape=_shape(equation),
        kernel_shape=[sizes[axis] for axis in over],
        strides=[strides[axis] for axis in over],
        pads=[padding[axis][end] for end in (0, 1) for axis in over],
        **attributes,
    )


def _max_pool(translator, equation, x):
    return _pool(translator, equation, x, "MaxPool")


def _sum_pool(translator, equation, x):
    """Return a sum over windows, as ONNX's mean times the size; padding is zeros."""
    if set(equation.params["window_dilation"]) != {1}:
        raise no_rule("a dilated average pooling")
    mean = _pool(translator, equation, x, "AveragePool", count_include_pad=1)
    size = math.prod(equation.params["window_dimensions"])
    return translator.linear(mean, by=size)


# Shapes.


def _transpose(translator, equation, x):
    return translator.permuted(x, equation.params["permutation"])


def _reshape(translator, equation, x):
    if equation.name == "reshape" and equation.params["dimensions"] is not None:
        raise no_rule("a reshape of a transpose")
    return translator.reshaped(x, _shape(equation))


def _broadcast(translator, equation, x):
    shape = _shape(equation)
    sizes = [1] * len(shape)
    for axis, size in zip(
        equation.params["broadcast_dimensions"], x.shape, strict=True
    ):
        sizes[axis] = size
    x = translator.reshaped(x, sizes)
    if tuple(sizes) == shape:
        return x
    x = translator.tensor(x)
    # An axis that keeps its length has 1 here, so that the batch stays open.
    wanted = [1 if sizes[a] == shape[a] else shape[a] for a in x.order]
    return translator.graph.apply(
        "Expand", x, np.asarray(wanted, np.int64), shape=shape
    )


def _tile(translator, equation, x):
    x, reps = translator.tensor(x), equation.params["reps"]
    if reps[translator.graph.batch_axis(x.shape)] != 1:
        raise no_rule("a repeated batch")
    repeats = np.asarray([reps[axis] for axis in x.order], np.int64)
    return translator.graph.apply("Tile", x, repeats, shape=_shape(equation))


def _pad(translator, equation, x, value):
    if not isinstance(value, np.ndarray):
        raise no_rule("a padding with an activation")
    *ends, gaps = zip(*equation.params["padding_config"], strict=True)
    x = translator.graph.dilated(translator.tensor(x), gaps, value)
    if not any(map(any, ends)):
        return x
    return translator.graph.padded(x, list(zip(*ends, strict=True)), value)


def _slice(translator, equation, x):
    columns = ("start_indices", "limit_indices", "strides")
    rows = [equation.params[column] for column in columns]
    return translator.graph.sliced(translator.tensor(x), *rows)


def _dynamic_slice(translator, equation, x, *starts):
    if not all(isinstance(start, np.ndarray) for start in starts):
        raise no_rule("a slice whose place depends on the image")
    sizes = equation.params["slice_sizes"]
    first = np.clip(np.asarray(starts, int), 0, np.subtract(x.shape, sizes))
    limits = (first + sizes).tolist()
    return translator.graph.sliced(translator.tensor(x), first.tolist(), limits)


def _reverse(translator, equation, x):
    axes = equation.params["dimensions"]
    return translator.graph.reversed(translator.tensor(x), axes)


def _parts(translator, x, axis, sizes):
    x, begin = translator.tensor(x), 0
    for size in map(int, sizes):
        starts, limits = [0] * len(x.shape), list(x.shape)
        starts[axis], limits[axis] = begin, begin + size
        yield translator.graph.sliced(x, starts, limits)
        begin += size


def _split(translator, equation, x):
    params = equation.params
    return list(_parts(translator, x, params["axis"], params["sizes"]))


def _unstack(translator, equation, x):
    axis = equation.params["axis"]
    parts = _parts(translator, x, axis, [1] * x.shape[axis])
    return [translator.reshaped(part, _shape(equation)) for part in parts]


def _joined(translator, parts, axis, shape):
    if translator.graph.is_batch(shape[axis]):
        raise no_rule("a batch that is put together")
    edges = [part for part in parts if not isinstance(part, np.ndarray)]
    first = translator.tensor(max(edges, key=lambda part: math.prod(part.shape)))
    parts = [
        translator.graph.repeated(part, first) if isinstance(part, np.ndarray) else part
        for part in parts
    ]
    names = [translator.tensor(part, first.order).name for part in parts]
    (at,) = first.axes([axis])
    return translator.graph.node("Concat", names, shape, first.order, axis=at)


def _concatenate(translator, equation, *parts):
    return _joined(translator, parts, equation.params["dimension"], _shape(equation))


def _stack(translator, equation, *parts):
    axis, shape = equation.params["axis"], _shape(equation)
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    parts = [
        part.reshape(one)
        if isinstance(part, np.ndarray)
        else translator.reshaped(part, one)
        for part in parts
    ]
    return _joined(translator, parts, axis, shape)


def _gather(translator, equation, x, indices):
    """Gather whole slices along one axis; refuse any other gather."""
    params, numbers = equation.params, equation.params["dimension_numbers"]
    shape, sizes = _shape(equation), params["slice_sizes"]
    axes = tuple(numbers.start_index_map)
    places = tuple(a for a in range(len(shape)) if a not in numbers.offset_dims)
    if len(axes) != 1 or not axes == places == tuple(numbers.collapsed_slice_dims):
        raise no_rule("a gather over several axes")
    whole = (*x.shape[: axes[0]], 1, *x.shape[axes[0] + 1 :])
    most = 0 if translator.graph.is_batch(x.shape[axes[0]]) else x.shape[axes[0]]
    if (
        tuple(sizes) != whole
        or not isinstance(indices, np.ndarray)
        or ((indices < 0) | (indices >= most)).any()
    ):
        raise no_rule(
            "a gather of parts, of the batch, or of what depends on the image"
        )
    x, where = translator.tensor(x), indices.reshape(-1).astype(np.int64)
    (at,) = x.axes(axes)
    return translator.graph.apply("Gather", x, where, shape=shape, axis=at)


# These primitives give values of their first operand, or the largest of some of them.
_MOVING = frozenset({
    "broadcast_in_dim", "dynamic_slice", "expand_dims", "gather", "reduce_max",
    "reduce_window_max", "reshape", "rev", "slice", "split", "squeeze", "tile",
    "transpose", "unstack",
})  # fmt: skip
_NODES = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh",
    "atan": "Atan", "atanh": "Atanh", "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh",
    "eq": "Equal", "erf": "Erf", "exp": "Exp", "floor": "Floor",
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "log": "Log",
    "logistic": "Sigmoid", "lt": "Less", "pow": "Pow", "sign": "Sign",
    "sin": "Sin", "sinh": "Sinh", "sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh",
}  # fmt: skip
_RULES: dict[str, Callable[..., Any]] = {
    **{name: _node(operator) for name, operator in _NODES.items()},
    **{name: _logical(name.title()) for name in ("and", "or", "xor", "not")},
    **dict.fromkeys(("copy", "copy_p", "stop_gradient"), _same),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(("add", "add_any"), _arithmetic("Add")),
    "sub": _arithmetic("Sub"),
    "mul": _arithmetic("Mul"),
    "div": _arithmetic("Div"),
    "neg": _negative,
    "max": _max,
    "min": _min,
    "integer_pow": _power,
    "select_n": _select,
    "clamp": _clamp,
    "erfc": _formula(lambda then, x: then("Sub", _ONE, then("Erf", x))),
    "expm1": _formula(lambda then, x: then("Sub", then("Exp", x), _ONE)),
    "is_finite": _formula(lambda then, x: then("Equal", then("Sub", x, x), _ZERO)),
    "log1p": _formula(lambda then, x: then("Log", then("Add", x, _ONE))),
    "ne": _formula(lambda then, a, b: then("Not", then("Equal", a, b))),
    "rsqrt": _formula(lambda then, x: then("Reciprocal", then("Sqrt", x))),
    "square": _formula(lambda then, x: then("Mul", x, x)),
    "convert_element_type": _convert,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "reduce_sum": _sum,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _sum_pool,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "tile": _tile,
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _reverse,
    "split": _split,
    "unstack": _unstack,
    "concatenate": _concatenate,
    "stack": _stack,
    "gather": _gather,
}
