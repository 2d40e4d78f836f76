"""Versions of this package and of the packages that it uses."""

import contextlib
import platform
from collections.abc import Iterable
from importlib import metadata

__version__ = "0.2.0"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of this package, of Python and of `packages`, by name.

    Packages that are not installed are left out.
    """
    found = {"adadfq_jax": __version__, "python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
