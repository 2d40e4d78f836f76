"""Collectives over the devices that share a global batch.

`axis_name` is the mapped axis over those devices, None on a single device.
"""

from typing import Any

import jax
import jax.numpy as jnp


def _is_layer(node: Any) -> bool:
    return isinstance(node, dict) and "mean" in node and "var" in node


def global_moments(bn_inputs: Any, axis_name: str | None) -> Any:
    """Combine each device's means and variances into those of the global batch.

    var = mean_d(var_d) + mean_d((mean_d - mean)^2) over the devices d, which is exact
    for shares of equal size.
    """
    if axis_name is None:
        return bn_inputs

    def combine(layer):
        mean = jax.lax.pmean(layer["mean"], axis_name)
        spread = layer["var"] + jnp.square(layer["mean"] - mean)
        return {"mean": mean, "var": jax.lax.pmean(spread, axis_name)}

    return jax.tree.map(combine, bn_inputs, is_leaf=_is_layer)


def share(tree: Any, axis_name: str | None) -> Any:
    """Take this device's slice of a global batch, which is a tree of [B, ...]."""
    if axis_name is None:
        return tree

    def own(x):
        size = x.shape[0] // jax.lax.axis_size(axis_name)
        start = jax.lax.axis_index(axis_name) * size
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    return jax.tree.map(own, tree)


def gather(tree: Any, axis_name: str | None) -> Any:
    """Gather the slices of all devices into the global batch: `share` undone."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


def mean_over(tree: Any, axis_name: str | None) -> Any:
    """Average a tree over the devices."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
