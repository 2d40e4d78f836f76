"""Versions of this package and of those that it stands on."""

import platform
from collections.abc import Iterable
from importlib import metadata

__version__ = "0.1.0"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions by name: of this package, of Python, and of installed packages."""
    return {
        "adadfq_jax": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
