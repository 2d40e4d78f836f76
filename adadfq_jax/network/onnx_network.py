"""A network that came as an ONNX graph: its nodes without weights, and as a function.

The graph is that of the file with everything decided that a file leaves to the runtime:
shapes are computed, constants are attributes or numbers, and nothing depends on the
number of images. It consists of plain JSON values, so that a quantized file holds it.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax.errors import InputError, first_line, short
from adadfq_jax.network.onnx_operators import OPERATORS
from adadfq_jax.network.sources import Function

MOST_NODES = 20_000
MOST_VALUES = 2**30  # numbers in one tensor, for one image


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
      operator: a name of `onnx_operators.OPERATORS`.
      inputs: names of tensors and variables, numbers, and None for an input that is
        left out.
      outputs: names of the results.
      attributes: by name.
    """

    operator: str
    inputs: tuple[str | float | None, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A network without its weights.

    Attributes:
      image: name of the batch of images.
      layout: its layout, 'NCHW' or 'NHWC'.
      logits: name of the output.
      nodes: in the order of their evaluation.
    """

    image: str
    layout: str
    logits: str
    nodes: tuple[Node, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a node is [operator, inputs, outputs, attributes]."""
        nodes = [
            [node.operator, node.inputs, node.outputs, dict(node.attributes)]
            for node in self.nodes
        ]
        return {
            "image": self.image,
            "layout": self.layout,
            "logits": self.logits,
            "nodes": nodes,
        }

    @functools.cached_property
    def statistics(self) -> dict[Any, Any]:
        """The means and variances of the batch norms, variances by means."""
        norms = [n for n in self.nodes if n.operator == "BatchNormalization"]
        return {node.inputs[3]: node.inputs[4] for node in norms}

    @functools.cached_property
    def reads(self) -> set[Any]:
        """The names that the nodes read."""
        return {name for node in self.nodes for name in node.inputs}

    def function(self, variables: Mapping[str, Any]) -> Function:
        """Return the network as a function of images NHWC.

        Args:
          variables: arrays or shapes, by name.
        """
        statistics = {*self.statistics, *self.statistics.values()}
        paths: dict[str, tuple[str | int, ...]] = {name: (name,) for name in variables}
        return Function(
            functools.partial(_apply, self),
            dict(variables),
            frozenset(variables) - statistics,
            paths,
            self.to_json(),
        )


def from_json(values: Any) -> OnnxGraph:
    """Build a graph from `OnnxGraph.to_json`.

    Raises:
      InputError: the values are not those of a graph that can be run.
    """
    try:
        image, layout, logits = (values[k] for k in ("image", "layout", "logits"))
        nodes = tuple(
            Node(operator, tuple(inputs), tuple(outputs), dict(attributes))
            for operator, inputs, outputs, attributes in values["nodes"]
        )
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"onnx: not a graph ({first_line(error)})") from error
    named = [image, logits, *(name for node in nodes for name in node.outputs)]
    if layout not in ["NCHW", "NHWC"] or not all(isinstance(n, str) for n in named):
        raise InputError("onnx: not a graph")
    if len(nodes) > MOST_NODES:
        raise InputError(f"onnx: more than {MOST_NODES:,} nodes")
    for node in nodes:
        known = isinstance(node.operator, str) and node.operator in OPERATORS
        if not known or not any(isinstance(x, str) for x in node.inputs):
            raise InputError(f"onnx: not a node: {short(str(node.operator))}")
        if not all(x is None or type(x) in (str, int, float) for x in node.inputs):
            raise InputError(f"onnx: inputs of {node.operator} have another type")
    return OnnxGraph(image, layout, logits, nodes)


def _apply(graph: OnnxGraph, variables: Mapping[str, Any], images: Array) -> Any:
    """Compute the logits of images [B, H, W, channels], in the dtype of the images.

    The parameters of batch norms stay in float32.
    """
    if graph.layout == "NCHW":
        images = images.transpose(0, 3, 1, 2)
    values: dict[Any, Any] = {**variables, graph.image: images}
    for node in graph.nodes:
        try:
            is_norm = node.operator == "BatchNormalization"
            dtype = jnp.float32 if is_norm else images.dtype
            inputs = [_input(values, x, dtype) for x in node.inputs]
            outputs = compute(node.operator, inputs, node.attributes)
            if is_norm:
                outputs = [output.astype(images.dtype) for output in outputs]
        except InputError:
            raise
        except Exception as error:  # whatever jax.numpy raises
            raise InputError(
                f"onnx: {node.operator} of {short(', '.join(node.outputs))} cannot be"
                f" computed ({first_line(error)})"
            ) from error
        values.update(zip(node.outputs, outputs, strict=False))
    return values[graph.logits]


def _input(values: Mapping[Any, Any], given: Any, dtype: Any) -> Any:
    if given is None:
        return None
    if not isinstance(given, str):
        return np.asarray(given, dtype)
    return jnp.asarray(values[given], dtype)


def compute(
    operator: str, inputs: Sequence[Any], attributes: Mapping[str, Any]
) -> Sequence[Any]:
    """Apply an operator to tensors; return all its outputs.

    Raises:
      ValueError: an output is too large.
    """
    found = OPERATORS[operator](*inputs, **attributes)
    outputs = found if isinstance(found, tuple | list) else [found]
    for output in outputs:
        if math.prod(output.shape[1:]) > MOST_VALUES:
            raise ValueError(f"a tensor of shape {output.shape}")
    return outputs


@functools.cache
def attributes_of(compute: Any) -> frozenset[str]:
    """Return the names of the attributes that an operator's function takes."""
    if isinstance(compute, np.ufunc) or compute is np.where:
        return frozenset()
    try:
        parameters = inspect.signature(compute).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
