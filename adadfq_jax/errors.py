"""What ends a run early: shown as one line, without a traceback."""


class InputError(ValueError):
    """A file, argument or setting that cannot be used; the message says why.

    Attributes:
      arguments: names of the arguments and settings in the message, as it has them.
        The command line shows them as configuration keys.
    """

    def __init__(self, message: object = "", *arguments: str):
        super().__init__(message)
        self.arguments = arguments


class NumericalError(ArithmeticError):
    """The game reached a number that is not finite; the message says where."""


class Stopped(Exception):
    """The run was asked to stop, and did; the message says what was kept."""


class ExportError(ArithmeticError):
    """An exported file does not compute what Q does; the message has the numbers."""


def one_line(error: Exception) -> str:
    """What an error says; of one that is not for the user, its kind as well."""
    said = " ".join(str(error).split())
    known = isinstance(error, InputError | OSError)
    return said if known else f"{type(error).__name__}: {said}"


def first_line(error: BaseException) -> str:
    """The kind of a library's error and the first line of what it says, cut at 200."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *(line[:200] for line in lines[:1])])


def short(text: str, most: int = 80) -> str:
    """What a file says, for a message: of bounded length, and printable."""
    cut = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in cut)
