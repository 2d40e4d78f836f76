"""Files that are written whole or not at all, their digests, and JSON."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from adadfq_jax.errors import InputError


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Calls writer(temporary path), then renames that to `path`.

    A reader sees the old file or the new one; after an error the old one, and no
    temporary.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        writer(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # whole after a power cut too
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say of which file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write(path, lambda temporary: temporary.write_text(text))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a binary file, whole or not at all."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write_stream(path: Path, writer: Callable[[IO[bytes]], Any]) -> None:
    """Writes what writer(binary file) writes, whole or not at all."""

    def to_file(temporary: Path) -> None:
        with temporary.open("wb") as file:
            writer(file)

    write(path, to_file)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that a person can read."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file of ours.

    Raises:
      InputError: it is not one.
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
    """Digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
