"""How the program was called, so that messages name commands in the same form."""

import shlex

_PROGRAM = "adadfq"  # of the installed package
_MODULE = "python -m adadfq_jax.main"

_has_subcommands = False


def use_subcommands() -> None:
    """From now on messages name commands as `adadfq inspect`."""
    global _has_subcommands
    _has_subcommands = True


def mode(name: str) -> str:
    """Returns what the user types for a mode, as '--mode=inspect'."""
    return f"{_PROGRAM} {name}" if _has_subcommands else f"--mode={name}"


def command(name: str, *arguments: str) -> list[str]:
    """Returns the words of a command, quoted for a shell: what is called, and the rest.

    Args:
      name: of the mode.
      *arguments: flags and folders.
    """
    called = f"{_PROGRAM} {name}" if _has_subcommands else _MODULE
    if not _has_subcommands and name != "train":
        called += f" --mode={name}"
    return [called, *map(shlex.quote, arguments)]


def repeated(argv: list[str]) -> str:
    """Returns the command that these arguments of the process were, for a shell."""
    called = _PROGRAM if _has_subcommands else _MODULE
    return f"{called} {shlex.join(argv[1:])}"
