"""Networks as users have them, as a pure function (variables, images) -> logits."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from adadfq_jax.errors import InputError
from adadfq_jax.network.trace import name_of

Function = Callable[[Any, Any], Any]


def as_function(network: Any, variables: Any = None) -> tuple[Function, Any]:
    """Makes a network a pure function and the tree of its variables.

    Args:
      network: a function (variables, images) -> logits; a Linen module, applied to
        images alone; an NNX module, which is put into inference mode; or any other
        pytree of arrays whose call takes a batch of images.
      variables: of a function or a Linen module; None where the network holds them.

    Returns:
      The function, and its variables.

    Raises:
      InputError: it is none of these, or the variables are missing or one too many.
    """
    kind = type(network).__name__
    if isinstance(network, nn.Module):
        _require(variables, f"{kind} is a Linen module, which does not hold them")
        return network.apply, variables
    if isinstance(network, nnx.Module):
        _refuse(variables, f"{kind} is an NNX module and holds its own")
        definition, state = nnx.split(network)
        inference = nnx.merge(definition, state)  # the user's own stays as it is
        inference.eval()
        definition, state = nnx.split(inference)
        return lambda v, images: nnx.merge(definition, v)(images), state
    if not callable(network):
        raise InputError(
            f"network: {kind} cannot be called; give a function (variables, images) ->"
            " logits, or a Linen or NNX module"
        )
    paths, structure = jax.tree_util.tree_flatten_with_path(network)
    holds_arrays = not jax.tree_util.treedef_is_leaf(structure)
    if not holds_arrays:
        _require(variables, "the function takes them as its first argument")
        return network, variables
    _refuse(variables, f"{kind} holds its own")
    # Numbers and functions among the leaves stay where they are.
    arrays = {
        name_of(path): leaf
        for path, leaf in paths
        if isinstance(leaf, jax.Array | np.ndarray)
    }
    leaves = [(name_of(path), leaf) for path, leaf in paths]

    def call(values: dict[str, Any], images: Any) -> Any:
        filled = [values.get(name, leaf) for name, leaf in leaves]
        return jax.tree_util.tree_unflatten(structure, filled)(images)

    return call, arrays


def _require(variables: Any, why: str) -> None:
    if variables is None:
        raise InputError(f"variables=None: {why}", "variables")


def _refuse(variables: Any, why: str) -> None:
    if variables is not None:
        raise InputError(f"variables: leave them out, {why}", "variables")
