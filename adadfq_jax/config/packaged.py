"""The configurations that come with the package, by name."""

import os
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from adadfq_jax.errors import InputError

_PACKAGE = Path(__file__).parents[1]
# An installed package has configs/ inside it; a clone has it beside the package.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def _files() -> dict[str, Path]:
    folder = next((f for f in _FOLDERS if f.is_dir()), _FOLDERS[0])
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def names() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return list(_files())


def _unknown(name: str, what: str = "not") -> InputError:
    return InputError(
        f"{name!r} is {what} a configuration of the package; those are"
        f" {', '.join(_files())}"
    )


def load(name: str, argument: str | None = None) -> ConfigDict:
    """Make a configuration of the package, for a file that changes some of its keys.

    Args:
      name: one of `names()`.
      argument: what stands after the colon on the command line, such as 'w4a4'.

    Raises:
      InputError: the package has no configuration of this name, or the argument is not
        valid.
    """
    if name not in _files():
        raise _unknown(name)
    return runpy.run_path(str(_files()[name]))["get_config"](argument)


def locate(text: str) -> str:
    """Return the file of a configuration that is given by its name.

    Args:
      text: 'NAME[:argument]' of a configuration of the package, or 'FILE[:argument]'.

    Returns:
      'FILE[:argument]'. Text that has a path separator or ends in .py names a file
      already; in it only ~ is replaced.

    Raises:
      InputError: the package has no configuration of this name.
    """
    name, colon, argument = text.partition(":")
    file = Path(name)
    found = _files()
    if name in found:
        return f"{found[name]}{colon}{argument}"
    if file.name != name or file.suffix == ".py" or file.is_file():
        return f"{os.path.expanduser(name)}{colon}{argument}"
    raise _unknown(name, "neither a file nor")
