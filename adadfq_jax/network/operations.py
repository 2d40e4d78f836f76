"""Which of JAX's operations move a tensor's values, and which are linear in it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

PRODUCTS = ("conv_general_dilated", "dot_general")

# fmt: off
# These move or pick values of the first operand; the other operands say where.
SHAPE = frozenset({
    "broadcast_in_dim", "broadcast_to", "convert_element_type", "copy", "copy_p",
    "device_put", "dynamic_slice", "expand_dims", "gather", "layout_constraint",
    "pad", "pvary", "reduce_max", "reduce_precision", "reduce_window_max",
    "reshape", "reshard", "rev", "sharding_constraint", "slice", "split", "squeeze",
    "stop_gradient", "tile", "transpose", "unstack",
})
# These are linear in all their operands together.
SUMS = frozenset({
    "add", "add_any", "concatenate", "dynamic_update_slice", "scatter", "scatter-add",
    "select_n", "stack", "sub",
})
# These are linear in one operand.
LINEAR = frozenset({
    "cumsum", "div", "mul", "neg", "reduce_sum", "reduce_window_sum",
})
NONLINEAR = frozenset({
    "abs", "acos", "acosh", "and", "approx_top_k", "argmax", "argmin", "asin",
    "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil",
    "clamp", "cond", "cos", "cosh", "cumlogsumexp", "cummax", "cummin", "cumprod",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "digamma", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt",
    "max", "min", "ne", "nextafter", "not", "or", "pow", "reduce", "reduce_and",
    "reduce_min", "reduce_or", "reduce_prod", "reduce_window", "reduce_window_min",
    "reduce_xor", "rem", "round", "rsqrt", "scan", "scatter-max", "scatter-min",
    "scatter-mul", "sign", "sin", "sinh", "sort", "sqrt", "square", "tan", "tanh",
    "top_k", "while", "xor",
})
# In these, a result's element may depend on operands' elements in other places.
_MIXING = frozenset({
    "approx_top_k", "argmax", "argmin", "concatenate", "cond", "cumlogsumexp",
    "cummax", "cummin", "cumprod", "cumsum", "dynamic_update_slice", "reduce",
    "scan", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul",
    "sort", "stack", "top_k", "while",
})
# fmt: on
KNOWN = SHAPE | SUMS | LINEAR | NONLINEAR
ELEMENTWISE = (SUMS | LINEAR | NONLINEAR) - _MIXING | {"convert_element_type"}

# Operands of a sum that say where values go, not which values are added.
_PLACES = {"select_n": slice(0, 1), "scatter": slice(1, 2), "scatter-add": slice(1, 2)}
_PLACES["dynamic_update_slice"] = slice(2, None)


def is_linear(name: str, params: dict[str, Any], dependent: Sequence[bool]) -> bool:
    """Return whether an operation moves values of a tensor or is linear in it.

    Args:
      name: the primitive's name.
      params: the equation's parameters.
      dependent: whether each operand depends on the tensor.
    """
    if name == "convert_element_type":
        return jnp.issubdtype(params["new_dtype"], jnp.inexact)
    if name in SHAPE:
        return not any(dependent[1:])
    if name in SUMS:
        return not any(dependent[_PLACES.get(name, slice(0))])
    if name == "div":
        return not dependent[1]
    return name in LINEAR and sum(dependent) == 1
