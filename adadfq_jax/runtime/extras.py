"""Packages that only an extra of this package brings, as `adadfq_jax[onnx]`."""

import importlib.util

from adadfq_jax.errors import InputError


def are_installed(*modules: str) -> bool:
    """Tells whether modules could be imported, without importing them."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def missing(what: str, package: str, extra: str, instead: str = "") -> InputError:
    """Returns the error that says which package is missing and how to install it.

    Args:
      what: that cannot be done, as 'a report'.
      package: that it needs.
      extra: of this package, which brings it.
      instead: what else the user can do, as 'or eval.enabled=False'.
    """
    ways = f"pip install 'adadfq_jax[{extra}]'"
    if instead:
        ways += f", {instead}"
    return InputError(f"{what} needs {package}: {ways}")
