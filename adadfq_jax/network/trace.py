"""Finds in a network's jaxpr what quantization needs; no module knows of it.

A kernel is an operand of a convolution or product that is computed from variables, the
other operand depending on the image. Where Q quantizes activations follows from a walk:
from the activation operand of every convolution and product back

- through operations that move or pick values (`SHAPE`),
- through linear ones with one operand that depends on the image (`LINEAR`),
- and at a sum or concatenation of several such values, into each of them.

A walk that ends at a nonlinearity quantizes its output, once for all that read it. One
that ends at the image or at another convolution or product does not: the paper
quantizes after activation functions and nowhere else.

Batch norms are found by their arithmetic: x - m, times rsqrt(v + epsilon) or divided by
sqrt(v + epsilon), m and v being computed from variables.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from adadfq_jax.errors import InputError
from adadfq_jax.network.graph import Activation, BatchNorm, Block, Graph, Kernel, Places
from adadfq_jax.network.program import (
    PRODUCTS,
    Constant,
    Equation,
    Operand,
    Program,
    Value,
    flatten,
)

SHAPE = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "copy_p",
        "dynamic_slice",
        "expand_dims",
        "gather",
        "optimization_barrier",
        "pad",
        "reduce_max",
        "reduce_precision",
        "reduce_window_max",
        "reshape",
        "rev",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    ]
)
LINEAR = frozenset(
    [
        "add",
        "add_any",
        "concatenate",
        "cumsum",
        "div",
        "mul",
        "neg",
        "reduce_sum",
        "reduce_window_sum",
        "sub",
    ]
)
NONLINEAR = frozenset(
    [
        "abs",
        "acos",
        "and",
        "argmax",
        "argmin",
        "asin",
        "atan",
        "atan2",
        "cbrt",
        "ceil",
        "clamp",
        "cond",
        "cos",
        "cosh",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "ne",
        "not",
        "or",
        "pow",
        "reduce_and",
        "reduce_min",
        "reduce_or",
        "reduce_prod",
        "rem",
        "round",
        "rsqrt",
        "scan",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sort",
        "sqrt",
        "square",
        "tan",
        "tanh",
        "top_k",
        "while",
    ]
)
TRACED_BATCH = 2
_AVERAGED = ("reduce_sum", "reduce_window_sum", "reduce_max", "reduce_min")
_CLIMBED = SHAPE - {"pad", "reduce_max", "reduce_window_max"}
_SOFTMAXES = ("softmax", "_softmax")


def trace(
    network: Callable[[Any, Any], Any],
    variables: Any,
    *,
    image_shape: Sequence[int],
    layout: str = "NHWC",
) -> Graph:
    """Finds kernels, activations, batch norms and blocks of a network.

    No weights are captured: the graph holds shapes and names.

    Args:
      network: a pure function (variables, images) -> logits [batch, classes].
      variables: a tree of arrays or of their shapes.
      image_shape: (H, W, channels).
      layout: 'NHWC', or 'NCHW' for a network that takes images so.

    Raises:
      InputError: the network cannot be applied, or cannot be quantized: it says why.
    """
    shape = tuple(int(size) for size in image_shape)
    if layout not in ("NHWC", "NCHW"):
        raise InputError(f"layout={layout!r}: must be NHWC or NCHW", "layout")
    one = shape if layout == "NHWC" else (shape[2], *shape[:2])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf)),
        variables,
    )
    names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]

    @functools.cache
    def analysis(batch: int) -> "_Analysis":
        images = jax.ShapeDtypeStruct((batch, *one), np.float32)
        return _Analysis(flatten(network, shapes, images), names, batch)

    found = analysis(TRACED_BATCH)
    return Graph(
        kernels=tuple(found.kernels),
        activations=tuple(found.activations),
        batch_norms=tuple(found.batch_norms),
        blocks=tuple(found.blocks),
        image_shape=shape,
        layout=layout,
        num_classes=int(found.program.output.shape[-1]),
        notes=tuple(found.notes),
        make_places=lambda batch: analysis(batch).places,
    )


_COLLECTIONS = ("params", "batch_stats")


def name_of(path: tuple[Any, ...]) -> str:
    """A tree path joined by dots, without the collection that it begins with."""
    parts = []
    for key in path:
        part = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
        if part != "value":  # of an NNX variable
            parts.append(str(part))
    if len(parts) > 1 and parts[0] in _COLLECTIONS:
        parts = parts[1:]
    return ".".join(parts)


class _Analysis:
    """A program and what is found in it."""

    def __init__(self, program: Program, names: Sequence[str], batch: int):
        self.notes: list[str] = []
        self._producers: dict[Any, tuple[int, Equation]] = {
            output: (i, equation)
            for i, equation in enumerate(program.equations)
            for output in equation.outputs
        }
        self._leaf_names: dict[Any, str] = dict(zip(program.leaves, names, strict=True))
        self._batch = batch
        self._check_output(program)
        self.program = self._without_softmax(program)
        self._dependent = self._find_dependent()
        self._check_batch()
        self._find_kernels()
        self._find_batch_norms()
        self._find_blocks()
        self.places = Places(
            self.program,
            self._kernel_places,
            self._activation_places,
            tuple(self._norm_places),
            tuple(self._cuts),
        )

    # What depends on what.

    def _find_dependent(self) -> set[Any]:
        """Values that depend on the image."""
        found = {self.program.image}
        for equation in self.program.equations:
            if any(operand in found for operand in equation.inputs):
                found.update(equation.outputs)
        return found

    def _producer(self, operand: Operand) -> Equation | None:
        found = self._producers.get(operand)
        return None if found is None else found[1]

    @functools.cached_property
    def _used(self) -> set[Any]:
        """Values that the output is computed from."""
        used, stack = set(), [self.program.output]
        while stack:
            operand = stack.pop()
            if operand not in used:
                used.add(operand)
                equation = self._producer(operand)
                stack += equation.inputs if equation else ()
        return used

    def _leaves_of(self, operand: Operand) -> list[Operand]:
        """The variables that a value is computed from, nearest first."""
        found: list[Operand] = []
        stack, seen = [operand], set()
        while stack:
            current = stack.pop(0)
            if current in seen:
                continue
            seen.add(current)
            if current in self._leaf_names:
                found.append(current)
            equation = self._producer(current)
            stack += equation.inputs if equation else ()
        return found

    # Refusals.

    def _check_output(self, program: Program) -> None:
        shape = program.output.shape
        if len(shape) != 2 or shape[0] != self._batch:
            raise InputError(
                f"network: its output is {shape} for {self._batch} images, not logits"
                " [batch, classes]"
            )

    def _check_batch(self) -> None:
        """Refuses what mixes the images of a batch, as batch norms in training do."""
        for equation in self.program.equations:
            operand = equation.inputs[0] if equation.inputs else None
            axes = equation.params.get("axes", ())
            if (
                equation.name in _AVERAGED
                and operand is not None
                and operand in self._dependent
                and 0 in axes
                and operand.shape[0] == self._batch
                and equation.outputs[0] in self._used
            ):
                raise InputError(
                    "network: it computes over the images of a batch, as batch norms in"
                    " training do; give the network in inference (Linen:"
                    " use_running_average=True or train=False, NNX: model.eval())"
                )

    def _without_softmax(self, program: Program) -> Program:
        """The program up to the logits."""
        equation = self._producer(program.output)
        inside = None
        if equation is not None and equation.name.startswith("custom_"):
            called = equation.params.get("name") or getattr(
                equation.params.get("call_jaxpr"), "jaxpr", None
            )
            if called in _SOFTMAXES:
                inside = equation.inputs[0]
        elif equation is not None and equation.name == "div":
            inside = self._softmax_of(equation)
        if inside is None:
            return program
        self.notes.append("a final softmax was cut off: the losses are on logits")
        return Program(program.equations, program.leaves, program.image, inside)

    def _softmax_of(self, division: Equation) -> Operand | None:
        """x of exp(x - max(x)) / sum(exp(x - max(x))), None of another division."""
        top, bottom = division.inputs
        exponential = self._producer(top)
        total = self._producer(self._climb(bottom, _CLIMBED))
        if (
            exponential is None
            or exponential.name != "exp"
            or total is None
            or total.name != "reduce_sum"
            or total.inputs[0] is not top
        ):
            return None
        shifted = self._producer(exponential.inputs[0])
        if shifted is None or shifted.name != "sub":
            return exponential.inputs[0]
        return shifted.inputs[0]

    # Kernels and activations.

    def _climb(self, operand: Operand, through: frozenset[str]) -> Operand:
        """Back through operations on one value."""
        while True:
            equation = self._producer(operand)
            if equation is None or equation.name not in through:
                return operand
            operand = equation.inputs[0]

    def _ends(self, operand: Operand) -> Iterator[tuple[Operand, str]]:
        """Where the walks from an operand end, and why there is nothing to quantize."""
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
                yield current, "a product of two activations"
            elif name in SHAPE or (
                name in LINEAR
                and (
                    len(dependent) == 1
                    or name in ("add", "add_any", "sub", "concatenate")
                )
            ):
                stack += dependent
            elif name in LINEAR or name in NONLINEAR:
                yield current, ""
            else:
                raise InputError(
                    f"network: the operation {name!r} is in none of the lists of"
                    " adadfq_jax.network.trace: it is not known to be linear or not"
                )

    def _is_constant_product(self, equation: Equation) -> bool:
        """Whether the other operand is from no variable, as a blur's kernel."""
        (other,) = (x for x in equation.inputs if x not in self._dependent)
        return not self._leaves_of(other)

    def _find_kernels(self) -> None:
        self.kernels: list[Kernel] = []
        self._kernel_places: dict[tuple[int, int], int] = {}
        self._product_names: dict[int, str] = {}
        self._activation_places: dict[Any, int] = {}
        values: list[Operand] = []  # of the activations
        readers: list[list[str]] = []
        counts: dict[str, int] = {}
        constants = 0
        for index, equation in enumerate(self.program.equations):
            if equation.name not in PRODUCTS or equation.outputs[0] not in self._used:
                continue
            sides = [i for i, x in enumerate(equation.inputs) if x in self._dependent]
            if len(sides) != 1:
                if len(sides) == 2 and equation.name == "conv_general_dilated":
                    raise InputError(
                        "network: the kernel of a convolution depends on the image"
                    )
                continue
            side = 1 - sides[0]
            kernel, operand = equation.inputs[side], equation.inputs[sides[0]]
            leaves = self._leaves_of(kernel)
            if not leaves:
                constants += 1
                continue
            name = self._leaf_names[leaves[0]]
            counts[name] = counts.get(name, 0) + 1
            if counts[name] > 1:  # one variable, several operations
                name = f"{name}#{counts[name]}"
            self._product_names[index] = name
            quantized, reason = [], ""
            for value, why in self._ends(operand):
                if why:
                    reason = reason or why
                elif value not in self._activation_places:
                    self._activation_places[value] = len(values)
                    values.append(value)
                    readers.append([])
                if not why:
                    quantized.append(self._activation_places[value])
            for place in quantized:
                readers[place].append(name)
            self._kernel_places[index, side] = len(self.kernels)
            self.kernels.append(
                Kernel(
                    name,
                    kernel.shape,
                    "product" if equation.name == "dot_general" else "convolution",
                    _out_axes(equation, side),
                    "" if reason else str(quantized[0]),
                    reason,
                    _multiplications(equation, side) // self._batch,
                )
            )
        if not self.kernels:
            raise InputError(
                "network: its weights are constants of the function; pass the variables"
                " as an argument, as in network(variables, images)"
                if constants
                else "network: it has no kernel, no convolution or product of an"
                " activation with variables"
            )
        if not values:
            raise InputError(
                "network: no nonlinearity comes before a convolution or product, so"
                " that there is no activation to quantize"
            )
        self._name_activations(values, readers)

    def _name_activations(
        self, values: Sequence[Operand], readers: Sequence[Sequence[str]]
    ) -> None:
        taken: dict[str, int] = {}
        names = []
        for reading in readers:
            name = f"{reading[0]}:input"
            taken[name] = taken.get(name, 0) + 1
            # The parts of a sum or a concatenation are read by one kernel.
            names.append(f"{name}{taken[name]}" if taken[name] > 1 else name)
        self.activations = [
            Activation(name, value.shape[1:], tuple(reading))
            for name, value, reading in zip(names, values, readers, strict=True)
        ]
        self.kernels = [
            kernel
            if kernel.reason
            else Kernel(
                **{**kernel.__dict__, "activation": names[int(kernel.activation)]}
            )
            for kernel in self.kernels
        ]

    # Batch norms.

    def _find_batch_norms(self) -> None:
        self.batch_norms: list[BatchNorm] = []
        self._norm_places: list[tuple[Operand, Operand, Operand]] = []
        users: dict[Any, list[Equation]] = {}
        for equation in self.program.equations:
            for operand in equation.inputs:
                users.setdefault(operand, []).append(equation)
        for equation in self.program.equations:
            if equation.name != "sub" or equation.outputs[0] not in self._used:
                continue
            x, mean = equation.inputs
            if x not in self._dependent or mean in self._dependent:
                continue
            variance = self._variance(equation.outputs[0], users)
            leaves = self._leaves_of(mean)
            if variance is None or not leaves:
                continue
            axis = _channel_axis(mean, x, self._producer(mean))
            if axis is None:
                continue
            name = self._leaf_names[leaves[0]].rpartition(".")[0]
            self.batch_norms.append(BatchNorm(name, x.shape[1:], axis))
            self._norm_places.append((x, mean, variance))

    def _variance(self, centred: Value, users: dict[Any, list[Equation]]) -> Any:
        """v of centred * rsqrt(v + epsilon) or centred / sqrt(v + epsilon)."""
        stack = [centred]
        while stack:
            current = stack.pop()
            for user in users.get(current, []):
                if user.name in ("reshape", "convert_element_type", "transpose"):
                    stack += user.outputs
                if user.name not in ("mul", "div"):
                    continue
                others = [x for x in user.inputs if x not in self._dependent]
                for other in others:
                    root = "rsqrt" if user.name == "mul" else "sqrt"
                    found = self._under_root(other, root)
                    if found is not None:
                        return found
        return None

    def _under_root(self, operand: Operand, root: str) -> Operand | None:
        """v of a factor that is scale * root(v + epsilon), in any order and shape."""
        stack = [operand]
        while stack:
            equation = self._producer(stack.pop())
            if equation is None:
                continue
            if equation.name == root or (
                equation.name in ("pow", "integer_pow") and root == "rsqrt"
            ):
                added = self._producer(self._climb(equation.inputs[0], _CLIMBED))
                if added is not None and added.name in ("add", "max"):
                    with_leaves = [x for x in added.inputs if self._leaves_of(x)]
                    if len(with_leaves) == 1:
                        return with_leaves[0]
            if equation.name in SHAPE or equation.name in ("mul", "div"):
                stack += [x for x in equation.inputs if self._leaves_of(x)]
        return None

    # Blocks.

    def _find_blocks(self) -> None:
        """Cuts the network where a single value goes on; blocks hold a kernel each."""
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
        for (at, _), (following, _) in zip(
            names_at, [*names_at[1:], (end, "")], strict=True
        ):
            between = [(i, value) for i, value in cuts if at <= i < following]
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
            if begin <= self._producers[x][0] <= stop
        )
        self.blocks.append(Block(kernels[0], kernels, made, value.shape[1:]))
        self._cuts.append(value)


def _out_axes(equation: Equation, side: int) -> tuple[int, ...]:
    """Axes of the output channels in the kernel."""
    numbers = equation.params["dimension_numbers"]
    if equation.name == "conv_general_dilated":
        spec = numbers.rhs_spec if side == 1 else numbers.lhs_spec
        return (spec[0],)
    contracting, batch = numbers
    gone = {*contracting[side], *batch[side]}
    return tuple(i for i in range(len(equation.inputs[side].shape)) if i not in gone)


def _multiplications(equation: Equation, side: int) -> int:
    """Of a batch."""
    output = math.prod(equation.outputs[0].shape)
    kernel = equation.inputs[side].shape
    numbers = equation.params["dimension_numbers"]
    if equation.name == "conv_general_dilated":
        return output * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return output * math.prod(kernel[axis] for axis in numbers[0][side])


def _channel_axis(mean: Operand, x: Operand, producer: Equation | None) -> int | None:
    """The axis of x along which the mean varies; None where there is not one."""
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
    return varying[0] if len(varying) == 1 and varying[0] > 0 else None
