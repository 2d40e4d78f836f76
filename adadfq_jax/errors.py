"""Exceptions that end a run early; each is shown as one line, without a traceback."""


class InputError(ValueError):
    """A file, argument or setting that cannot be used; the message says why.

    Attributes:
      arguments: names of arguments and settings as they stand in the message. The
        command line shows them as configuration keys.
    """

    def __init__(self, message: object = "", *arguments: str):
        super().__init__(message)
        self.arguments = arguments


class NumericalError(ArithmeticError):
    """The game reached a number that is not finite; the message says where."""


class Stopped(Exception):
    """The run was asked to stop and stopped; the message says what was saved."""


class ExportError(ArithmeticError):
    """An exported file cannot be run, or does not compute what Q does."""


def one_line(error: Exception) -> str:
    """Return an error's message in one line, after its type if it is unexpected."""
    said = " ".join(str(error).split())
    known = isinstance(error, InputError | OSError)
    return said if known else f"{type(error).__name__}: {said}"


def first_line(error: BaseException) -> str:
    """Return the type and the first line, cut at 200, of a library's error."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *(line[:200] for line in lines[:1])])


def short(text: str, most: int = 80) -> str:
    """Make a file's text fit for a message: printable, at most `most` characters."""
    cut = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in cut)
