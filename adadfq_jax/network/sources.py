"""Turns a user's network into a pure function (variables, images) -> logits."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from adadfq_jax.errors import InputError
from adadfq_jax.network.program import cannot_be_applied
from adadfq_jax.network.run import named

_PARAMETERS = "params"  # the collection that Linen trains
# What to give in place of a module that does not take a batch of images alone.
_LINEN_ADVICE = (
    "give a function, lambda variables, images: module.apply(variables, images,"
    " train=False)"
)
_NNX_ADVICE = (
    "give a function and its variables: definition, state = nnx.split(model); lambda"
    " state, images: nnx.merge(definition, state)(images, train=False)"
)
_PYTREE_ADVICE = (
    "a module of a single image, as Equinox's are, is given as a function that maps it"
    " over the batch: arrays, static = eqx.partition(model, eqx.is_array); lambda"
    " arrays, images: jax.vmap(eqx.combine(arrays, static))(images) (with a state: see"
    " docs/guides/own-network.md)"
)
# Linen raises these for a network in training mode, which updates statistics or draws
# random numbers.
_TRAINING_ERRORS = (flax.errors.ModifyScopeVariableError, flax.errors.InvalidRngError)


class Function(NamedTuple):
    """A network as a pure function of named variables.

    Attributes:
      apply: (variables by name, images) -> logits.
      variables: arrays, or their shapes, by name.
      parameters: names of the variables that may be trained.
      paths: by name, the keys that lead to a variable in the tree that the network
        takes; None where that tree is not made of dictionaries and lists.
      definition: the network itself as JSON values, see `onnx_network.OnnxGraph`; None
        where it is code.
    """

    apply: Callable[[Mapping[str, Any], Any], Any]
    variables: dict[str, Any]
    parameters: frozenset[str]
    paths: dict[str, tuple[str | int, ...]] | None = None
    definition: dict[str, Any] | None = None

    def of_shapes(self) -> "Function":
        """Return a copy that holds the shapes of the variables in place of arrays."""
        return self._replace(variables=jax.tree.map(_shape_of, self.variables))


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf))


def as_function(network: Any, variables: Any = None) -> Function:
    """Make a network a pure function of variables by name.

    Args:
      network: a function (variables, images) -> logits; a Linen module, which is
        applied to images alone; an NNX module, which is put into inference mode; any
        other pytree of arrays that can be called on a batch of images; or a `Function`,
        which stays as it is.
      variables: the variables of a function or a Linen module; None where the network
        holds them itself.

    Raises:
      InputError: the network is none of these or takes more than images, or variables
        are missing, or they are given although the network holds its own.
    """
    if isinstance(network, Function):
        return network if variables is None else network._replace(variables=variables)
    if isinstance(network, type):
        name = network.__name__
        raise InputError(f"network: {name} is a class; give an instance, {name}(...)")
    kind = type(network).__name__
    if isinstance(network, nn.Module):
        _require(variables, f"{kind} is a Linen module, which does not hold them")
        _refuse_more_than_images(network, _LINEN_ADVICE)
        return _of_tree(
            _advised(network.apply, _LINEN_ADVICE, _TRAINING_ERRORS), variables
        )
    if isinstance(network, nnx.Module):
        _refuse(variables, f"{kind} is an NNX module and holds its own")
        _refuse_more_than_images(network, _NNX_ADVICE)
        definition, state = nnx.split(network)
        inference = nnx.merge(definition, state)  # a copy: the user's stays as it is
        inference.eval()
        definition, trained, others = nnx.split(
            inference,
            nnx.Param,
            ...,  # type: ignore[misc]
        )
        return _of_tree(
            lambda v, images: nnx.merge(definition, v[_PARAMETERS], v["batch_stats"])(
                images
            ),
            {_PARAMETERS: trained, "batch_stats": others},
        )
    if not callable(network):
        raise InputError(
            f"network: {kind} cannot be called; give a function (variables, images) ->"
            " logits, or a Linen or NNX module"
        )
    leaves, structure = jax.tree.flatten(network)
    if jax.tree_util.treedef_is_leaf(structure):
        _require(
            variables,
            "the function takes them as its first argument; weights that it holds"
            " itself cannot be quantized",
        )
        return _of_tree(network, variables)
    _refuse(variables, f"{kind} holds its own")
    _refuse_more_than_images(network, _PYTREE_ADVICE)
    # Numbers and functions among the leaves stay where they are.
    every = dict(zip(named(network), leaves, strict=True))
    arrays = {
        name: leaf
        for name, leaf in every.items()
        if isinstance(leaf, jax.Array | np.ndarray)
    }

    def call(values: Mapping[str, Any], images: Any) -> Any:
        filled = [values.get(name, leaf) for name, leaf in every.items()]
        return jax.tree.unflatten(structure, filled)(images)

    return Function(_advised(call, _PYTREE_ADVICE), arrays, frozenset(arrays))


def _refuse_more_than_images(network: Any, way_out: str) -> None:
    """Refuse a module whose call needs more arguments than images."""
    try:
        parameters = list(inspect.signature(network).parameters.values())
    except (TypeError, ValueError):
        return  # its arguments are not known
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in several
    ]
    if len(needed) > 1:
        raise InputError(
            f"network: {type(network).__name__} takes {', '.join(needed[1:])} beside"
            f" the images; {way_out}"
        )


def _advised(
    apply: Callable[[Any, Any], Any],
    way_out: str,
    kinds: tuple[type[Exception], ...] = (Exception,),
) -> Callable[[Any, Any], Any]:
    """Make errors of some kinds in `apply` say what to give in place of the network."""

    def advised(variables: Any, images: Any) -> Any:
        try:
            return apply(variables, images)
        except kinds as error:
            raise cannot_be_applied(images, error, way_out) from error

    return advised


def _of_tree(apply: Callable[[Any, Any], Any], variables: Any) -> Function:
    leaves, structure = named(variables), jax.tree.structure(variables)
    trained = frozenset(leaves)
    if isinstance(variables, Mapping) and _PARAMETERS in variables:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
        trained = frozenset(
            name
            for name, path in zip(leaves, paths, strict=True)
            if getattr(path[0], "key", None) == _PARAMETERS
        )

    def call(values: Mapping[str, Any], images: Any) -> Any:
        filled = [values[name] for name in leaves]
        return apply(jax.tree.unflatten(structure, filled), images)

    return Function(call, leaves, trained, _paths(variables))


def _paths(variables: Any) -> dict[str, tuple[str | int, ...]] | None:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    keys: list[tuple[Any, ...]] = [
        tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)
        for path in paths
    ]
    if not all(isinstance(k, str | int) for path in keys for k in path):
        return None
    return dict(zip(named(variables), keys, strict=True))


def tree_of(leaves: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]) -> Any:
    """Build the tree of dictionaries and lists that `Function.paths` describes.

    Args:
      leaves: the leaves by name.
      paths: the keys that lead to each leaf, by name; a whole number is an index into
        a list.
    """
    root: dict[Any, Any] = {}
    for name, path in paths.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaves[name]
    return _with_lists(root)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    inner = {key: _with_lists(value) for key, value in node.items()}
    if inner and all(isinstance(key, int) for key in inner):
        return [inner[key] for key in sorted(inner)]
    return inner


def _require(variables: Any, why: str) -> None:
    if variables is None:
        raise InputError(f"variables=None: {why}", "variables")


def _refuse(variables: Any, why: str) -> None:
    if variables is not None:
        raise InputError(f"variables: leave them out, {why}", "variables")
