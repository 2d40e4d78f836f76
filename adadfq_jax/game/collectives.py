"""What devices that share a global batch tell each other; None is a single device."""

from typing import Any

import jax
import jax.numpy as jnp


def _is_layer(node: Any) -> bool:
    return isinstance(node, dict) and "mean" in node and "var" in node


def global_moments(bn_inputs: Any, axis_name: str | None) -> Any:
    """Means and variances of the global batch from those of each device's share.

    var = mean_d(var_d) + mean_d((mean_d - mean)^2), exact for equal shares.
    """
    if axis_name is None:
        return bn_inputs

    def combine(layer):
        mean = jax.lax.pmean(layer["mean"], axis_name)
        spread = layer["var"] + jnp.square(layer["mean"] - mean)
        return {"mean": mean, "var": jax.lax.pmean(spread, axis_name)}

    return jax.tree.map(combine, bn_inputs, is_leaf=_is_layer)


def share(tree: Any, axis_name: str | None) -> Any:
    """The slice of a global batch, a tree of [B, ...], that falls to the device."""
    if axis_name is None:
        return tree

    def own(x):
        size = x.shape[0] // jax.lax.axis_size(axis_name)
        start = jax.lax.axis_index(axis_name) * size
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    return jax.tree.map(own, tree)


def gather(tree: Any, axis_name: str | None) -> Any:
    """The inverse of `share`."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


def mean_over(tree: Any, axis_name: str | None) -> Any:
    """The mean of a tree over the devices."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
