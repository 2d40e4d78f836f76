"""Errors that a user can mend: shown as one line, without a traceback."""


class InputError(ValueError):
    """A file, flag or configuration that cannot be used; the message says why."""
