"""Files that are written completely or not at all, their digests, and JSON."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from adadfq_jax.errors import InputError


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Write a file atomically: call writer(temporary path), then rename the file.

    A reader sees either the old file or the complete new one. After an error the old
    file is still there and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        writer(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the file is complete after a power cut, too
        os.replace(temporary, path)
    except OSError as error:  # the error of a full disk does not name the file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    write(path, lambda temporary: temporary.write_text(text))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file, completely or not at all."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write_stream(path: Path, writer: Callable[[IO[bytes]], Any]) -> None:
    """Write a file by writer(open binary file), completely or not at all."""

    def to_file(temporary: Path) -> None:
        with temporary.open("wb") as file:
            writer(file)

    write(path, to_file)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented and with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file that this package wrote.

    Raises:
      InputError: the file does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except ValueError as error:
        raise InputError(
            f"{path}: damaged ({error}); restore it, or choose another workdir"
        ) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
