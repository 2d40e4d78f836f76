"""Flags, one-line errors and exit codes for all command lines."""

from __future__ import annotations

import contextlib
import functools
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from adadfq_jax import config
from adadfq_jax.errors import ExportError, InputError, NumericalError
from adadfq_jax.runtime import signals

if TYPE_CHECKING:  # importing it now would import JAX, which is slow
    from adadfq_jax.recipes import Recipe

EXIT_BAD_INPUT = 2
EXIT_NUMERICAL = 3
EXIT_EXPORT = 4


def parse_flags(argv: list[str], default_config: str = "") -> list[str]:
    """Parse the flags with absl; an error ends the process with one line and code 2.

    Args:
      argv: the program and its arguments.
      default_config: the flag --config where it is not given, or ''.
    """
    try:
        config.refuse_unknown_keys(argv)
        is_given = any(re.match("--?config(=|$)", argument) for argument in argv)
        if default_config and not is_given:
            flags.FLAGS.set_default("config", default_config)
        rest = flags.FLAGS(argv)
        if len(rest) > 1 and not _takes_folders():
            raise InputError(f"{rest[1]!r}: flags start with --, as in --config=FILE")
        return rest
    except (flags.Error, OSError) as error:
        # The text of a failing config file is a traceback; its last line says why.
        reason = str(error).strip().splitlines()[-1]
        leave(
            EXIT_BAD_INPUT, reason.removeprefix(f"{InputError.__module__}.InputError: ")
        )
    except InputError as error:
        leave(EXIT_BAD_INPUT, error)


class _Named(flags.ArgumentParser):
    """A parser of config files that also accepts names of packaged configurations."""

    def __init__(self, of_files: flags.ArgumentParser):
        super().__init__()
        self._of_files = of_files

    def parse(self, argument: str) -> ConfigDict:
        return self._of_files.parse(config.locate(argument))

    def flag_type(self) -> str:
        return self._of_files.flag_type()


def define_config(text: str) -> flags.FlagHolder[ConfigDict]:
    """Define the flags --config=NAME[:argument] or FILE[:argument], and --config.KEY.

    Args:
      text: the help text of the flag.
    """
    holder = config_flags.DEFINE_config_file("config", None, text)
    flag = flags.FLAGS["config"]
    flag.parser = _Named(flag.parser)
    return holder


class ConfigFile(NamedTuple):
    """A configuration file that was executed.

    Attributes:
      get_config: makes the configuration from the argument after the colon.
      recipe: the recipe that the file defines, or None.
    """

    get_config: Callable[[str | None], ConfigDict]
    recipe: Recipe | None


@functools.cache
def config_file(file: str) -> ConfigFile:
    """Execute a configuration file, or the packaged one of this name, only once.

    Raises:
      InputError: the file does not exist, fails, or has no get_config.
    """
    file = config.locate(file)
    if not Path(file).is_file():
        raise InputError(f"{file}: no such file")
    with _explained(file):
        found = runpy.run_path(file)
        make_recipe = found.get("get_recipe")
        recipe = None if make_recipe is None else make_recipe()
    if "get_config" not in found:
        raise InputError(f"{file}: it has no get_config")

    def get_config(argument: str | None) -> ConfigDict:
        with _explained(f"{file}: get_config({argument!r})"):
            return found["get_config"](argument)

    return ConfigFile(get_config, recipe)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise InputError in place of any other error of a user's file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {type(error).__name__}: {error}") from error


def load_config(text: str) -> ConfigDict:
    """Return the configuration of 'NAME[:argument]' or 'FILE[:argument]'."""
    file, _, argument = text.partition(":")
    return config_file(file).get_config(argument or None)


def _takes_folders() -> bool:
    """Tell whether the mode is 'compare', which alone takes arguments: folders."""
    return "mode" in flags.FLAGS and flags.FLAGS["mode"].value == "compare"


def leave(code: int, reason: object) -> NoReturn:
    """End the process with one line on stderr and an exit code."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(code)


def run(action: Callable[[], None]) -> None:
    """Run an action; errors that a user can act on end the process with their code."""
    try:
        action()
    except (InputError, OSError) as error:
        leave(EXIT_BAD_INPUT, error)
    except ExportError as error:
        leave(EXIT_EXPORT, error)
    except NumericalError as error:
        leave(EXIT_NUMERICAL, error)
    except KeyboardInterrupt:  # outside of training, when there is nothing to save
        sys.exit(signals.EXIT_CODES[signal.SIGINT])
