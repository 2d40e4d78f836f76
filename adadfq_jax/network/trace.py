"""Finds in a network's jaxpr what quantization needs; the network stays as it is.

A kernel is an operand of a convolution or product that is computed from variables,
while the other operand depends on the image. A walk finds the activations that Q
quantizes. It starts at the activation operand of every convolution and product and
goes back

- through operations that move or pick values (`SHAPE`),
- through linear operations with one operand that depends on the image (`LINEAR`),
- and at a sum or concatenation of several such values, into each of them (`SUMS`). But
  a sum counts as a nonlinearity where it is, element by element, a nonlinear function
  of one value, such as max(x, 0) + a * min(x, 0).

Where a walk ends at a nonlinearity, the output of that nonlinearity is quantized, once
for all operations that read it. Where a walk ends at the image or at another
convolution or product, nothing is quantized: the paper quantizes after activation
functions and nowhere else.

The rule 'all' quantizes these activations and also every tensor that depends on the
image and enters a convolution, a product or a sum of several activations. Operations
that only move values come after the quantization.

Batch norms are found by their arithmetic: x - m, times rsqrt(v + epsilon) or divided by
sqrt(v + epsilon), where m and v are computed from variables. The multiplied-out form
x * s + (b - m * s), with such a root in s, is found too.

The traced batch has an unusual size, so that no other axis has its size or a multiple.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from typing import Any

import jax
import numpy as np

from adadfq_jax.errors import InputError
from adadfq_jax.network.graph import (
    Activation,
    BatchNorm,
    Block,
    Graph,
    Kernel,
    Places,
    Product,
)
from adadfq_jax.network.operations import (
    ELEMENTWISE,
    KNOWN,
    PRODUCTS,
    SHAPE,
    SUMS,
    is_linear,
)
from adadfq_jax.network.program import (
    Constant,
    Equation,
    Operand,
    Program,
    Value,
    flatten,
)
from adadfq_jax.network.run import named

PLACES = ("nonlinearities", "all")  # where activations are quantized
TRACED_BATCHES = (211, 223, 227, 229)  # primes, so that few axes are multiples of one
# These keep all values of a tensor, in their order.
_KEEPING = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze"}
)
_TWO_ACTIVATIONS = "a product of two activations"


def trace(
    network: Callable[[Any, Any], Any],
    variables: Any,
    *,
    image_shape: Sequence[int],
    layout: str = "NHWC",
    places: str = "nonlinearities",
    parameters: Collection[str] | None = None,
    dtype: Any = np.float32,
) -> Graph:
    """Find the kernels, activations, batch norms and blocks of a network.

    The graph holds shapes and names, no weights.

    Args:
      network: a pure function (variables, images) -> logits [batch, classes].
      variables: a tree of arrays or of their shapes.
      image_shape: (H, W, channels).
      layout: layout of the images that the network takes, 'NHWC' or 'NCHW'.
      places: which activations are quantized: 'nonlinearities' for the outputs of
        nonlinearities, 'all' for every one that enters a convolution, product or sum.
      parameters: names of the variables that may be trained; None for all.
      dtype: dtype of the images.

    Raises:
      InputError: the network cannot be applied or cannot be quantized; the message
        says why.
    """
    shape = tuple(int(size) for size in image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"image_shape={shape}: must be (H, W, channels)")
    if layout not in ("NHWC", "NCHW"):
        raise InputError(f"layout={layout!r}: must be NHWC or NCHW", "layout")
    if places not in PLACES:
        raise InputError(f"places={places!r}: must be one of {', '.join(PLACES)}")
    one = shape if layout == "NHWC" else (shape[2], *shape[:2])
    names = list(named(variables))
    leaves, structure = jax.tree.flatten(variables)
    shapes = jax.tree.unflatten(structure, list(map(_shape_of, leaves, names)))

    def program(batch: int) -> Program:
        images = jax.ShapeDtypeStruct((batch, *one), dtype)
        return flatten(network, shapes, images)

    traced, first = _first_program(
        program, [shape, *(x.shape for x in jax.tree.leaves(shapes))]
    )
    found = _Analysis(first, names, traced, places)

    home = jax.sharding.get_abstract_mesh()

    def located(batch: int) -> Places:
        return on_mesh(batch, jax.sharding.get_abstract_mesh())

    # One program for each mesh: JAX traces the derivative of a custom call once, where
    # it is first needed, and that trace is valid on that mesh alone.
    @functools.cache
    def on_mesh(batch: int, mesh: Any) -> Places:
        if (batch, mesh) == (traced, home):
            return found.places
        at = _Analysis(program(batch), names, batch, places, found.blocks)
        if not at.is_like(found):
            raise InputError(
                f"network: it is not the same for {batch} images as for other batch"
                " sizes; its layers must not depend on the number of images"
            )
        return at.places

    return Graph(
        kernels=tuple(found.kernels),
        products=tuple(found.products),
        activations=tuple(found.activations),
        batch_norms=tuple(found.batch_norms),
        blocks=tuple(found.blocks),
        image_shape=shape,
        layout=layout,
        rule=places,
        num_classes=int(found.program.output.shape[-1]),
        variables=tuple(names),
        needed=found.needed(),
        parameters=found.parameters(names if parameters is None else parameters),
        beside_kernels=found.beside_kernels(),
        dtype=np.dtype(dtype),
        traced_batch=traced,
        notes=tuple(found.notes),
        make_places=located,
    )


def batches_beside(shapes: Iterable[Sequence[int]]) -> list[int]:
    """Return the traced batches of which no axis is a multiple, or the first of all."""
    sizes = {size for shape in shapes for size in shape if size}
    found = [batch for batch in TRACED_BATCHES if all(n % batch for n in sizes)]
    return found or [*TRACED_BATCHES[:1]]


def _first_program(
    program: Callable[[int], Program], shapes: Iterable[Sequence[int]]
) -> tuple[int, Program]:
    """Trace a network with a batch that no other axis can be mistaken for.

    Where each could be mistaken, it is the first.

    Args:
      program: the network's program for a number of images.
      shapes: of the variables and of an image.
    """
    found = []
    for batch in batches_beside(shapes):
        found.append((batch, program(batch)))
        sizes = (math.prod(value.shape) for value in found[-1][1].dependent)
        if all(size % batch**2 or not size for size in sizes):  # it is there once
            return found[-1]
    return found[0]


def _shape_of(leaf: Any, name: str) -> jax.ShapeDtypeStruct:
    try:
        return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf))
    except (TypeError, ValueError):
        raise InputError(
            f"variables: {name} is no array but a {type(leaf).__name__}; pass arrays"
            " only (Equinox: eqx.partition(model, eqx.is_array), NNX: nnx.split)"
        ) from None


class _Analysis:
    """A program and the entries of the graph that are found in it.

    Args:
      program: the network's program for `batch` images.
      names: names of its leaves.
      batch: number of images.
      rule: where activations are quantized, see `trace`.
      blocks: the network's blocks from the first analysis; None in the first analysis.
    """

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        batch: int,
        rule: str,
        blocks: Sequence[Block] | None = None,
    ):
        self.notes: list[str] = []
        self._producers: dict[Any, tuple[int, Equation]] = {
            output: (i, equation)
            for i, equation in enumerate(program.equations)
            for output in equation.outputs
        }
        self._leaf_names: dict[Any, str] = dict(zip(program.leaves, names, strict=True))
        self._batch, self._everywhere = batch, rule == "all"
        self._check_output(program)
        self.program = self._without_softmax(program)
        self._dependent = program.dependent
        if blocks is None:
            self._check_batch()
        self._find_kernels()
        self._find_batch_norms()
        self._find_blocks(blocks)
        self.places = Places(
            self.program,
            self._kernel_places,
            self._activation_places,
            tuple(self._norm_places),
            tuple(self._cuts),
        )

    def is_like(self, other: "_Analysis") -> bool:
        """Return whether another batch size has entries of the same names."""
        return (
            [kernel.name for kernel in self.kernels]
            == [kernel.name for kernel in other.kernels]
            and [x.name for x in self.activations]
            == [x.name for x in other.activations]
            and [norm.name for norm in self.batch_norms]
            == [norm.name for norm in other.batch_norms]
            and [block.kernels for block in self.blocks]
            == [block.kernels for block in other.blocks]
        )

    # What depends on what.

    def _producer(self, operand: Operand) -> Equation | None:
        found = self._producers.get(operand)
        return None if found is None else found[1]

    def _behind(
        self, operand: Operand, cut: Collection[tuple[int, int]] = ()
    ) -> Iterator[Operand]:
        """Yield a value and all that it is computed from, nearest first.

        Args:
          operand: the value.
          cut: inputs that are not followed, as (index of the equation, side).
        """
        queue, seen = collections.deque([operand]), {operand}
        while queue:
            current = queue.popleft()
            yield current
            index, equation = self._producers.get(current, (-1, None))
            for side, x in enumerate(equation.inputs if equation else ()):
                if x not in seen and (index, side) not in cut:
                    seen.add(x)
                    queue.append(x)

    @functools.cached_property
    def _used(self) -> set[Any]:
        """The values that the output is computed from."""
        return set(self._behind(self.program.output))

    def _leaves_of(self, operand: Operand) -> list[Operand]:
        """Find the variables that a value is computed from, nearest first."""
        return [x for x in self._behind(operand) if x in self._leaf_names]

    def _name_from(self, leaves: Sequence[Operand]) -> str:
        """Return the name of the largest variable, the nearest of several as large.

        So a kernel is not named after a scale that it is multiplied with.
        """
        leaf = max(leaves, key=lambda leaf: math.prod(leaf.shape))
        return self._leaf_names[leaf]

    def _without_batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Take the batch out of a shape, also where an axis is a multiple of it."""
        for axis, size in enumerate(shape):
            if size % self._batch == 0:
                rest = () if size == self._batch else (size // self._batch,)
                return (*shape[:axis], *rest, *shape[axis + 1 :])
        return shape

    # Refusals.

    def _check_output(self, program: Program) -> None:
        shape = program.output.shape
        if len(shape) != 2 or shape[0] != self._batch:
            raise InputError(
                f"network: its output is {shape} for {self._batch} images, not logits"
                " [batch, classes]; one that takes a single image is given as a"
                " function that maps it over the batch (jax.vmap)"
            )

    def _check_batch(self) -> None:
        """Refuse operations that mix images of a batch, as training batch norms do."""
        for equation in self.program.equations:
            if self._used.isdisjoint(equation.outputs):
                continue
            axes = [equation.params.get("axes", ()), ()]
            if equation.name == "dot_general":
                axes = equation.params["dimension_numbers"][0]
            elif not equation.name.startswith(("reduce_", "arg")):
                continue
            if any(
                operand in self._dependent and operand.shape[axis] % self._batch == 0
                for operand, reduced in zip(equation.inputs, axes, strict=False)
                for axis in reduced
            ):
                raise InputError(
                    "network: it computes over the images of a batch, as batch norms in"
                    " training do; give the network in inference (Linen:"
                    " use_running_average=True or train=False, NNX: model.eval())"
                )

    def _without_softmax(self, program: Program) -> Program:
        """Return the program without a final softmax, so that it ends at the logits."""
        chain = []  # operations after the softmax that change only shape or precision
        equation = self._producer(program.output)
        while equation is not None and equation.name in _KEEPING:
            chain.append(equation)
            equation = self._producer(equation.inputs[0])
        inside = None
        if equation is not None and equation.name == "div":
            inside = self._softmax_of(equation)
        if inside is None:
            return program
        self.notes.append("a final softmax was cut off: the losses are on logits")
        equations, dependent = list(program.equations), set(program.dependent)
        for step in reversed(chain):
            output = Value(step.outputs[0].aval)
            again = dataclasses.replace(
                step, inputs=(inside, *step.inputs[1:]), outputs=(output,)
            )
            self._producers[output] = len(equations), again
            equations.append(again)
            dependent.add(output)
            inside = output
        return dataclasses.replace(
            program,
            equations=tuple(equations),
            output=inside,
            dependent=frozenset(dependent),
        )

    def _softmax_of(self, division: Equation) -> Operand | None:
        """Return x of exp(x) / sum(exp(x)), None if the division is no softmax.

        It is also x where the exponents are x - max(x).
        """
        top, bottom = division.inputs
        exponential = self._producer(top)
        total = self._producer(self._climb(bottom, _KEEPING | {"stop_gradient"}))
        if (
            exponential is None
            or exponential.name != "exp"
            or total is None
            or total.name != "reduce_sum"
            or self._climb(total.inputs[0], _KEEPING) is not top
            or math.prod(total.outputs[0].shape) != self._batch
        ):
            return None
        shifted = self._producer(exponential.inputs[0])
        if shifted is not None and shifted.name == "sub":
            x, shift = shifted.inputs
            if self._is_maximum(shift, x):
                return x
        return exponential.inputs[0]

    def _is_maximum(self, operand: Operand, x: Operand) -> bool:
        """Return whether an operand is max(x), also beside a constant, as -inf."""
        through = _KEEPING | {"stop_gradient"}
        equation = self._producer(self._climb(operand, through))
        if equation is not None and equation.name == "max":
            computed, *others = sorted(
                (self._climb(y, through) for y in equation.inputs),
                key=lambda y: isinstance(y, Constant),
            )
            if not isinstance(others[0], Constant):
                return False
            equation = self._producer(computed)
        return (
            equation is not None
            and equation.name == "reduce_max"
            and math.prod(equation.outputs[0].shape) == self._batch
            and self._climb(equation.inputs[0], through) is self._climb(x, through)
        )

    # Kernels and activations.

    def _climb(self, operand: Operand, through: frozenset[str]) -> Operand:
        """Go back from an operand through the named operations' first inputs."""
        while True:
            equation = self._producer(operand)
            if equation is None or equation.name not in through:
                return operand
            operand = equation.inputs[0]

    def _ends(self, operand: Operand) -> Iterator[tuple[Operand, str]]:
        """Walk back from an operand to the values where the walks end.

        Yields:
          A value and the reason why it is not quantized, '' where it is quantized.
        """
        stack, seen = [operand], set()
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current is self.program.image:
                yield current, "the image"
                continue
            equation = self._producer(current)
            assert equation is not None, "depends on the image, so that it is computed"
            dependent = [x for x in equation.inputs if x in self._dependent]
            name = equation.name
            if name in PRODUCTS and len(dependent) == 1:
                index, _ = self._producers[current]
                if self._is_constant_product(equation):
                    stack += dependent
                    continue
                yield current, f"the linear output of {self._product_names[index]}"
            elif name in PRODUCTS:
                yield current, _TWO_ACTIVATIONS
            elif name not in KNOWN:
                raise InputError(
                    f"network: the operation {name!r} is in none of the lists of"
                    " adadfq_jax.network.operations: it is not known to be linear"
                )
            elif _is_linear(equation, self._dependent) and not (
                name in SUMS and self._is_of_one_value(equation)
            ):
                stack += dependent
            else:
                yield current, ""

    def _is_of_one_value(self, equation: Equation) -> bool:
        """Return whether a sum is elementwise a nonlinear function of one value."""
        front = {x for x in equation.inputs if x in self._dependent}
        nonlinear = False
        while len(front) > 1:
            latest = max(front, key=lambda x: self._producers.get(x, (-1,))[0])
            producer = self._producer(latest)
            if (
                producer is None
                or producer.name not in ELEMENTWISE
                or latest.shape != equation.outputs[0].shape
            ):
                return False
            nonlinear |= not _is_linear(producer, self._dependent)
            front.remove(latest)
            front |= {x for x in producer.inputs if x in self._dependent}
        return nonlinear

    def _is_constant_product(self, equation: Equation) -> bool:
        """Return whether no variable is in the other operand, as in a fixed blur."""
        (other,) = (x for x in equation.inputs if x not in self._dependent)
        return not self._leaves_of(other)

    def _find_kernels(self) -> None:
        self.kernels: list[Kernel] = []
        self._kernel_places: dict[tuple[int, int], int] = {}
        self._product_names: dict[int, str] = {}
        places: dict[Any, int] = {}  # the index of each activation
        self._activation_places = places
        self.products: list[Product] = []
        readers: list[list[str]] = []
        counts: dict[str, int] = {}
        for index, equation in enumerate(self.program.equations):
            if equation.outputs[0] not in self._used:
                continue
            if self._everywhere and self._is_sum(equation):
                for operand in equation.inputs:
                    value = self._climb(operand, SHAPE)
                    if value in self._dependent and value not in places:
                        places[value] = len(readers)
                        readers.append([self._first_reader(value)])
            if equation.name not in PRODUCTS:
                continue
            operation = "product" if equation.name == "dot_general" else "convolution"
            sides = [i for i, x in enumerate(equation.inputs) if x in self._dependent]
            if 1 in sides and operation == "convolution":
                raise InputError(
                    "network: the kernel of a convolution depends on the image"
                )
            if not sides:
                continue
            side = 1 - sides[0]
            kernel, operand = equation.inputs[side], equation.inputs[sides[0]]
            count = _multiplications(equation, side) // self._batch
            leaves = self._leaves_of(kernel)
            if len(sides) == 2 or not leaves:
                reason = (
                    _TWO_ACTIVATIONS if len(sides) == 2 else "its kernel is a constant"
                )
                shape = self._without_batch(kernel.shape)
                self.products.append(Product(operation, shape, reason, count))
                continue
            name = self._name_from(leaves)
            counts[name] = counts.get(name, 0) + 1
            if counts[name] > 1:  # several operations read one variable
                name = f"{name}#{counts[name]}"
            self._product_names[index] = name
            read, reason = [], ""
            for value, why in self._ends(operand):
                if not why:
                    read.append(value)
                reason = reason or why
            if self._everywhere:
                read, reason = [self._climb(operand, SHAPE), *read], ""
            for value in read:
                if value not in places:
                    places[value] = len(readers)
                    readers.append([])
                readers[places[value]].append(name)
            self._kernel_places[index, side] = len(self.kernels)
            self.kernels.append(
                Kernel(
                    name,
                    kernel.shape,
                    operation,
                    _out_axes(equation, side),
                    "" if reason else str(places[read[0]]),
                    reason,
                    count,
                )
            )
        if not self.kernels:
            raise InputError(
                "network: its weights are constants of the function; pass the variables"
                " as an argument, as in network(variables, images)"
                if any(x.reason != _TWO_ACTIVATIONS for x in self.products)
                else "network: it has no kernel, that is, no convolution or product of"
                " an activation with variables"
            )
        if not places:
            raise InputError(
                "network: no nonlinearity comes before a convolution or product, so"
                " that there is no activation to quantize"
            )
        self._name_activations(list(places), readers)

    def _is_sum(self, equation: Equation) -> bool:
        """Return whether an equation adds or joins several activations."""
        dependent = [x for x in equation.inputs if x in self._dependent]
        return (
            equation.name in SUMS
            and len(dependent) > 1
            and not self._is_of_one_value(equation)
        )

    @functools.cached_property
    def _users(self) -> dict[Any, list[tuple[int, Equation]]]:
        users: dict[Any, list[tuple[int, Equation]]] = {}
        for at in enumerate(self.program.equations):
            for operand in at[1].inputs:
                users.setdefault(operand, []).append(at)
        return users

    def _first_reader(self, value: Operand) -> str:
        """Return the name of the first kernel that reads an activation directly.

        Directly means that no other kernel lies between. Without such a kernel the
        name is 'logits'.
        """
        stack, seen, found = [value], set(), []
        while stack:
            for at, user in self._users.get(stack.pop(), []):
                if at in seen or user.outputs[0] not in self._used:
                    continue
                seen.add(at)
                if user.name in PRODUCTS:
                    found.append((at, user))
                else:
                    stack += user.outputs
        for _, user in sorted(found, key=lambda at: at[0]):
            others = [x for x in user.inputs if x not in self._dependent]
            if others and self._leaves_of(others[0]):
                return self._name_from(self._leaves_of(others[0]))
        return "logits"

    def _name_activations(
        self, values: Sequence[Operand], readers: Sequence[Sequence[str]]
    ) -> None:
        taken: dict[str, int] = {}
        names = []
        for reading in readers:
            name = f"{reading[0]}:input"
            taken[name] = taken.get(name, 0) + 1
            # One kernel may read several activations, the parts of a sum.
            names.append(f"{name}{taken[name]}" if taken[name] > 1 else name)
        self.kernels = [
            kernel
            if kernel.reason
            else dataclasses.replace(kernel, activation=names[int(kernel.activation)])
            for kernel in self.kernels
        ]
        # Activations are listed in the order in which they are computed.
        order = sorted(
            range(len(values)), key=lambda i: self._producers.get(values[i], (-1,))[0]
        )
        self.activations = [
            Activation(
                names[i], self._without_batch(values[i].shape), tuple(readers[i])
            )
            for i in order
        ]
        self._activation_places = {values[i]: at for at, i in enumerate(order)}

    def parameters(self, allowed: Collection[str]) -> tuple[str, ...]:
        """Return the trainable variables' names: no statistics, no integers."""
        statistics = {
            leaf
            for _, *both in self._norm_places
            for x in both
            for leaf in self._leaves_of(x)
        }
        return tuple(
            name
            for leaf, name in self._leaf_names.items()
            if name in allowed
            and leaf in self._used
            and leaf not in statistics
            and jax.dtypes.issubdtype(leaf.aval.dtype, np.floating)
        )

    def needed(self) -> tuple[str, ...]:
        """Return the names of the variables that the logits are computed from."""
        return tuple(n for leaf, n in self._leaf_names.items() if leaf in self._used)

    def beside_kernels(self) -> tuple[str, ...]:
        """Return the names of the variables needed where all kernels are given."""
        found = set(self._behind(self.program.output, self._kernel_places))
        return tuple(n for leaf, n in self._leaf_names.items() if leaf in found)

    # Batch norms.

    def _find_batch_norms(self) -> None:
        self.batch_norms: list[BatchNorm] = []
        self._norm_places: list[tuple[Operand, Operand, Operand]] = []
        counts: dict[str, int] = {}
        for equation in self.program.equations:
            if self._used.isdisjoint(equation.outputs):
                continue
            found = self._norm_of(equation)
            if found is None:
                continue
            x, mean, variance, broadcast = found
            axis = _channel_axis(broadcast, x, self._producer(broadcast))
            mean = self._climb(mean, _KEEPING)
            variance = self._climb(variance, _KEEPING)
            sizes = {math.prod(value.shape) for value in (mean, variance)}
            if axis is None or sizes != {x.shape[axis]}:
                continue
            leaf = self._leaf_names[self._leaves_of(mean)[0]]
            name = leaf.rpartition(".")[0] or leaf
            counts[name] = counts.get(name, 0) + 1
            if counts[name] > 1:
                name = f"{name}#{counts[name]}"
            shape = self._without_batch(x.shape)
            variables = tuple(self._leaf_names.get(x, "") for x in (mean, variance))
            self.batch_norms.append(BatchNorm(name, shape, axis, variables))
            self._norm_places.append((x, mean, variance))

    def _norm_of(
        self, equation: Equation
    ) -> tuple[Operand, Operand, Operand, Operand] | None:
        """Return x, mean and variance of a batch norm that an equation begins or ends.

        The fourth value is a tensor that varies along the channels of x, as it is
        broadcast. The result is None where the equation neither begins nor ends one.
        """
        if equation.name == "sub":
            x, mean = equation.inputs
            if x in self._dependent and self._is_statistic(mean):
                variance = self._variance(equation.outputs[0])
                if variance is not None:
                    return x, mean, variance, mean
        if equation.name not in ("add", "sub"):
            return None
        # x * s + t with t = b - m * s, whatever the order.
        scaled, shift = equation.inputs
        if scaled not in self._dependent and equation.name == "add":
            scaled, shift = shift, scaled
        if shift in self._dependent:
            return None
        x, variance, scales = scaled, None, set[Operand]()
        while True:
            product = self._producer(self._climb(x, _KEEPING))
            if product is None or product.name != "mul":
                return None
            inner = [y for y in product.inputs if y in self._dependent]
            if len(inner) != 1:
                return None
            (scale,) = (y for y in product.inputs if y not in self._dependent)
            scales.update(self._leaves_of(scale))
            variance = variance or self._under_root(scale, 1)
            x = inner[0]
            if variance is not None:
                centre = self._shifted_mean(shift, variance, scales)
                if centre is not None:
                    return x, centre, variance, shift

    def _is_statistic(self, operand: Operand) -> bool:
        return operand not in self._dependent and bool(self._leaves_of(operand))

    def _shifted_mean(
        self, shift: Operand, variance: Operand, scales: Set[Operand]
    ) -> Operand | None:
        """Return m of b - m * s, where s holds the root of a variance."""
        stack = [shift]
        while stack:
            equation = self._producer(stack.pop())
            if equation is None:
                continue
            if equation.name == "mul":
                for one, other in (equation.inputs, equation.inputs[::-1]):
                    if (
                        scales == set(self._leaves_of(one))
                        and self._under_root(one, 1) is variance
                    ):
                        mean = self._climb(other, _KEEPING | {"neg"})
                        if mean in self._leaf_names:
                            return mean
            if equation.name in ("add", "sub", "neg", *_KEEPING):
                stack += equation.inputs
        return None

    def _variance(self, centred: Value) -> Operand | None:
        """Return v of centred * rsqrt(v + epsilon) or centred / sqrt(v + epsilon)."""
        stack: list[Operand] = [centred]
        while stack:
            for _, user in self._users.get(stack.pop(), []):
                dependent = [x in self._dependent for x in user.inputs]
                if user.name in _KEEPING or user.name == "transpose":
                    stack += user.outputs
                elif dependent in ([True, False], [False, True]) and (
                    user.name == "mul" or (user.name == "div" and dependent[0])
                ):
                    factor = user.inputs[dependent.index(False)]
                    found = self._under_root(factor, 1 if user.name == "mul" else -1)
                    if found is not None:
                        return found
                    stack += user.outputs  # a scale may come before the root
        return None

    def _under_root(self, operand: Operand, sign: int) -> Operand | None:
        """Return v of a factor that is scale * (v + epsilon) ** (-sign / 2)."""
        stack = [(operand, sign)]
        while stack:
            current, sign = stack.pop()
            equation = self._producer(current)
            if equation is None:
                continue
            name, inputs = equation.name, equation.inputs
            if self._exponent(equation) == -sign / 2:
                added = self._producer(self._climb(inputs[0], _KEEPING))
                if added is not None and added.name in ("add", "max"):
                    leaves = [x for x in added.inputs if self._leaves_of(x)]
                    if leaves:  # epsilon may be a variable too
                        return max(leaves, key=lambda x: math.prod(x.shape))
            if name in SHAPE or name == "mul":
                stack += [(x, sign) for x in inputs]
            elif name == "div":
                stack += [(inputs[0], sign), (inputs[1], -sign)]
            elif name == "integer_pow" and equation.params["y"] == -1:
                stack.append((inputs[0], -sign))
        return None

    def _exponent(self, equation: Equation) -> float:
        """Return the exponent of a power or root, 0 for any other operation."""
        if equation.name == "pow":
            exponent = self._climb(equation.inputs[1], _KEEPING)
            if isinstance(exponent, Constant) and np.size(exponent.array) == 1:
                return float(np.ravel(exponent.array)[0])
        return {"rsqrt": -0.5, "sqrt": 0.5}.get(equation.name, 0.0)

    # Blocks.

    def _find_blocks(self, known: Sequence[Block] | None) -> None:
        """Cut the network into blocks where a single value is passed on.

        Each block holds at least one kernel, and axis 0 of that value is the batch.
        Where other axes are as long as the batch, the known blocks tell which value
        it is.
        """
        ends = {block.kernels[-1]: block.shape for block in known or ()}
        last_use: dict[Any, int] = {}
        for index, equation in enumerate(self.program.equations):
            for operand in equation.inputs:
                last_use[operand] = index
        end = len(self.program.equations)
        last_use[self.program.output] = end
        alive: set[Any] = {self.program.image}
        cuts: list[tuple[int, Operand]] = []
        for index, equation in enumerate(self.program.equations):
            alive |= {
                x for x in equation.outputs if x in self._dependent and x in self._used
            }
            alive = {x for x in alive if last_use.get(x, -1) > index}
            if len(alive) == 1:
                cuts.append((index, next(iter(alive))))
        names_at = sorted(
            (index, self.kernels[place].name)
            for (index, _), place in self._kernel_places.items()
        )
        self.blocks: list[Block] = []
        self._cuts: list[Operand] = []
        begin = 0
        for (at, name), (following, _) in zip(
            names_at, [*names_at[1:], (end, "")], strict=True
        ):
            between = [
                (i, value)
                for i, value in cuts
                if at <= i < following
                and value.shape[:1] == (self._batch,)
                and (known is None or ends.get(name) == value.shape[1:])
            ]
            if following == end:
                between = [(end, self.program.output)]
            if not between:
                continue
            stop, value = between[-1]
            self._add_block(names_at, begin, stop, value)
            begin = stop + 1

    def _add_block(
        self, names_at: Sequence[tuple[int, str]], begin: int, stop: int, value: Operand
    ) -> None:
        kernels = tuple(name for i, name in names_at if begin <= i <= stop)
        made = tuple(
            self.activations[place].name
            for x, place in self._activation_places.items()
            if begin <= self._producers.get(x, (0,))[0] <= stop
        )
        self.blocks.append(Block(kernels[0], kernels, made, value.shape[1:]))
        self._cuts.append(value)


def _is_linear(equation: Equation, dependent: Set[Any]) -> bool:
    """Return whether an equation is linear in its operands that are in a set."""
    marks = [operand in dependent for operand in equation.inputs]
    return is_linear(equation.name, equation.params, marks)


def _out_axes(equation: Equation, side: int) -> tuple[int, ...]:
    """Return the axes of the output channels in the kernel."""
    numbers = equation.params["dimension_numbers"]
    if equation.name == "conv_general_dilated":
        spec = numbers.rhs_spec if side == 1 else numbers.lhs_spec
        return (spec[0],)
    contracting, _ = numbers
    rank = len(equation.inputs[side].shape)
    return tuple(i for i in range(rank) if i not in contracting[side])


def _multiplications(equation: Equation, side: int) -> int:
    """Count the multiplications of an equation for the whole batch."""
    output = math.prod(equation.outputs[0].shape)
    kernel = equation.inputs[side].shape
    numbers = equation.params["dimension_numbers"]
    if equation.name == "conv_general_dilated":
        zeros = math.prod(equation.params["lhs_dilation"])
        return output * math.prod(kernel) // kernel[numbers.rhs_spec[0]] // zeros
    return output * math.prod(kernel[axis] for axis in numbers[0][side])


def _channel_axis(mean: Operand, x: Operand, producer: Equation | None) -> int | None:
    """Return the one axis of x along which the mean varies, None if there is none."""
    shape = mean.shape
    if len(shape) != len(x.shape):
        return None
    if isinstance(mean, Constant) or producer is None:
        varying = [i for i, size in enumerate(shape) if size > 1]
    elif producer.name == "broadcast_in_dim":
        dims = producer.params["broadcast_dimensions"]
        sizes = producer.inputs[0].shape
        varying = [d for d, size in zip(dims, sizes, strict=True) if size > 1] or [
            *dims[-1:]
        ]
    else:
        varying = [i for i, size in enumerate(shape) if size > 1]
    if not varying:
        varying = [len(shape) - 1]
    return varying[0] if len(varying) == 1 else None
