"""How the program was called; messages then name commands in the same form."""

import shlex

_PROGRAM = "adadfq"  # the command of the installed package
_MODULE = "python -m adadfq_jax.main"

_has_subcommands = False


def use_subcommands() -> None:
    """Name commands as subcommands from now on, such as `adadfq inspect`."""
    global _has_subcommands
    _has_subcommands = True


def has_subcommands() -> bool:
    """Tell whether the installed command was called."""
    return _has_subcommands


def mode(name: str) -> str:
    """Return what the user types for a mode: '--mode=inspect' or 'adadfq inspect'."""
    return f"{_PROGRAM} {name}" if _has_subcommands else f"--mode={name}"


def command(name: str, *arguments: str) -> list[str]:
    """Return the parts of a command: the program with its mode, then the arguments.

    Args:
      name: the name of the mode.
      *arguments: flags and folders; they are quoted for a shell.
    """
    called = f"{_PROGRAM} {name}" if _has_subcommands else _MODULE
    if not _has_subcommands and name != "train":
        called += f" --mode={name}"
    return [called, *map(shlex.quote, arguments)]


def repeated(argv: list[str]) -> str:
    """Return the shell command that started a process with the arguments `argv`."""
    called = _PROGRAM if _has_subcommands else _MODULE
    return f"{called} {shlex.join(argv[1:])}"
