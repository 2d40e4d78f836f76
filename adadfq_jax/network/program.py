"""A network's jaxpr as one flat list of equations; each value is its own object."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from adadfq_jax.errors import InputError, first_line
from adadfq_jax.network.operations import PRODUCTS, is_linear

# Calls that are replaced by their equations; any other call is one operation.
_CALLS = ("jit", "closed_call", "core_call", "call", "composite")
_INLINED = (*_CALLS, "remat", "remat2", "checkpoint")
# These stay whole where they are a nonlinearity, such as relu, since they bring their
# own derivative.
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# These pass their operands on unchanged, and are left out of the flat list.
_IDENTITIES = ("optimization_barrier", "name")


class Value:
    """A result of an equation, or an input of the network.

    Attributes:
      aval: its abstract value.
    """

    __slots__ = ("aval",)

    def __init__(self, aval: Any):
        self.aval = aval

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, with the traced batch."""
        return tuple(self.aval.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A number or an array that is part of the network itself."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return np.shape(self.array)


Operand = Value | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One operation: outputs = primitive(inputs)."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[Value, ...]

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.primitive.name

    @property
    def parameters(self) -> dict[str, Any]:
        """The primitive's parameters, with JAX's default precision if none is set."""
        if "precision" not in self.params or self.params["precision"] is not None:
            return self.params
        # The network left the precision open, so it is decided where it is run.
        chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        both = None if chosen is None else (jax.lax.Precision(chosen),) * 2
        return {**self.params, "precision": both}

    def evaluate(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Compute the outputs from the values of the inputs."""
        # As in jax.core.eval_jaxpr, functions among the parameters are rebuilt.
        parameters = self.primitive.get_bind_params(self.parameters)
        found = self.primitive.bind(*inputs, **parameters)
        return found if self.primitive.multiple_results else [found]


@dataclasses.dataclass(frozen=True)
class Program:
    """A network at one batch size.

    Attributes:
      equations: the equations, in the order of their evaluation.
      leaves: the network's variables, in the order of its tree.
      image: the batch of images.
      output: the logits.
      dependent: the values that depend on the image.
    """

    equations: tuple[Equation, ...]
    leaves: tuple[Value, ...]
    image: Value
    output: Operand
    dependent: frozenset[Any]


def has_product(jaxpr: core.Jaxpr) -> bool:
    """Return whether a jaxpr holds a convolution or a product, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            return True
        if any(has_product(inner) for inner in _inside(equation)):
            return True
    return False


def _inside(equation: Any) -> Iterator[core.Jaxpr]:
    for parameter in equation.params.values():
        parts = parameter if isinstance(parameter, tuple | list) else [parameter]
        for part in parts:
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _called(equation: Any) -> tuple[core.Jaxpr, Sequence[Any]] | None:
    """Return a call's jaxpr and its constants; None for any other operation."""
    name, params = equation.primitive.name, equation.params
    inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
    if inner is None or name not in (*_INLINED, *_CUSTOM):
        return None
    closed = isinstance(inner, core.ClosedJaxpr)
    return (inner.jaxpr, inner.consts) if closed else (inner, ())


def _inlined(
    equation: Any, dependent: Sequence[bool]
) -> tuple[core.Jaxpr, Sequence[Any]] | None:
    """Do as `_called`, but return None for a nonlinearity with its own derivative."""
    called = _called(equation)
    if called is None or equation.primitive.name not in _CUSTOM:
        return called
    jaxpr, _ = called
    return called if has_product(jaxpr) or _is_linear(jaxpr, dependent) else None


def _is_linear(jaxpr: core.Jaxpr, dependent: Sequence[bool]) -> bool:
    """Return whether a jaxpr without products is linear in its marked inputs."""
    found = {v for v, marked in zip(jaxpr.invars, dependent, strict=True) if marked}
    for equation in jaxpr.eqns:
        marks = [
            not isinstance(x, core.Literal) and x in found for x in equation.invars
        ]
        if not any(marks):
            continue
        called = _inlined(equation, marks)
        if not (
            equation.primitive.name in _IDENTITIES
            or (called is not None and _is_linear(called[0], marks))
            or is_linear(equation.primitive.name, equation.params, marks)
        ):
            return False
        found.update(equation.outvars)
    return True


class _Flattener:
    def __init__(self, *images: Operand) -> None:
        self.equations: list[Equation] = []
        self.dependent: set[Any] = set(images)  # values that depend on the image

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Operand]
    ) -> list[Operand]:
        # Calls share an inner jaxpr and its variables, so each call has its own values.
        values: dict[Any, Operand] = {}
        values.update(zip(jaxpr.constvars, map(Constant, consts), strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Operand:
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return Constant(np.asarray(atom.val, aval.dtype))
            return values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            outputs = self._equation(equation, operands)
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Operand]) -> Sequence[Operand]:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":  # choose the branch for any other platform
            platforms = params["platforms"]
            if None not in platforms:
                raise InputError(
                    "network: it has a jax.lax.platform_dependent without a branch for"
                    " any other platform; give it a default"
                )
            return [Constant(np.int32(platforms.index(None)))]
        if name == "cond" and isinstance(operands[0], Constant):
            chosen = params["branches"][int(operands[0].array)]
            return self.run(chosen.jaxpr, chosen.consts, operands[1:])
        if name in _IDENTITIES:
            return operands
        dependent = [operand in self.dependent for operand in operands]
        called = _inlined(equation, dependent)
        if called is not None:
            return self.run(*called, operands)
        if any(dependent) and any(map(has_product, _inside(equation))):
            what = "a loop" if name in ("scan", "while") else "an operation"
            raise InputError(
                f"network: it has a convolution or product inside {what} ({name}),"
                " where kernels are not looked for; write the layers out"
            )
        outputs = tuple(Value(variable.aval) for variable in equation.outvars)
        inputs = tuple(operands)
        if any(dependent):
            self.dependent.update(outputs)
        self.equations.append(Equation(equation.primitive, params, inputs, outputs))
        return outputs


def flatten(
    function: Callable[[Any, Any], Any], variables: Any, images: Any
) -> Program:
    """Trace a function (variables, images) -> logits and flatten its jaxpr.

    Args:
      function: a pure function.
      variables: a tree of arrays or of their shapes.
      images: a batch of images, or its shape.

    Raises:
      InputError: the function cannot be applied, has a product inside a loop, or does
        not return one array.
    """
    try:
        # No mesh and no precision are traced in, so that the program can run on any
        # mesh and at any precision (see `Equation.parameters`).
        anywhere = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
        with anywhere, jax.default_matmul_precision(None):
            make = jax.make_jaxpr(function, return_shape=True)
            closed, shapes = make(variables, images)
    except InputError:
        raise
    except Exception as error:  # whatever the network raises
        raise cannot_be_applied(images, error) from error
    if len(jax.tree.leaves(shapes)) != 1:
        raise InputError(
            "network: it must give one array, logits [batch, classes], not"
            f" {jax.tree.structure(shapes)}"
        )
    inputs = [Value(variable.aval) for variable in closed.jaxpr.invars]
    *leaves, image = inputs
    flattener = _Flattener(image)
    (output,) = flattener.run(closed.jaxpr, closed.consts, inputs)
    return Program(
        tuple(flattener.equations),
        tuple(leaves),
        image,
        output,
        frozenset(flattener.dependent),
    )


def cannot_be_applied(images: Any, error: Exception, way_out: str = "") -> InputError:
    """Make the error for a network that raised an error on a batch of images."""
    advice = f"; {way_out}" if way_out else ""
    return InputError(
        f"network: it cannot be applied to a batch of {tuple(images.shape)}"
        f" ({first_line(error)}){advice}"
    )


def inside(
    equation: Equation,
) -> tuple[Sequence[Equation], Sequence[Operand]] | None:
    """Flatten the function that an equation calls, one with its own derivative.

    Returns:
      The function's equations on the equation's inputs, and the function's outputs;
      None where the equation is no call.
    """
    called = _called(equation)
    if called is None:
        return None
    flattener = _Flattener(*equation.inputs)
    outputs = flattener.run(*called, equation.inputs)
    return flattener.equations, outputs
