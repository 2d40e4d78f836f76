"""Reading state dicts from PyTorch and safetensors files."""

import zipfile
from pathlib import Path

import numpy as np

from adadfq_jax.errors import InputError
from adadfq_jax.teacher import safetensors_file, torch_file


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors or PyTorch file, by name.

    The content of the file decides its kind, not the file's name.

    Raises:
      InputError: the file does not exist, is damaged, or is of neither kind.
    """
    require_file(path)
    if not is_safetensors(path):
        return torch_file.read(path)
    try:
        arrays, _ = safetensors_file.read(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    arrays = {name: torch_file.as_float32(array) for name, array in arrays.items()}
    return torch_file.without_module(arrays)


def require_file(path: Path) -> None:
    """Refuse a path that is no file, or an empty one."""
    if path.is_dir():
        raise InputError(f"{path}: it is a folder; teacher.path must name P's file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; teacher.path must name P's file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")


def is_safetensors(path: Path) -> bool:
    """Tell whether a file starts like safetensors: a length, then a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def file_kind(path: Path) -> str:
    """Name the kind of a file that could be read: safetensors or a PyTorch form."""
    if is_safetensors(path):
        return "safetensors"
    return f"PyTorch checkpoint ({'zip' if zipfile.is_zipfile(path) else 'legacy'})"
