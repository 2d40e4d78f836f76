"""Packages that only an extra of this package installs, such as `adadfq_jax[onnx]`."""

import importlib.util

from adadfq_jax.errors import InputError


def are_installed(*modules: str) -> bool:
    """Tell whether modules can be imported, without importing them."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def missing(what: str, package: str, extra: str, instead: str = "") -> InputError:
    """Return the error that says which package is missing and how to install it.

    Args:
      what: the thing that cannot be made, such as 'a report'.
      package: the package that it needs.
      extra: the extra of this package that installs it.
      instead: what else the user can do, such as 'or eval.enabled=False'.
    """
    ways = f"pip install 'adadfq_jax[{extra}]'"
    if instead:
        ways += f", {instead}"
    return InputError(f"{what} needs {package}: {ways}")
