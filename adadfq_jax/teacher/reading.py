"""State dicts from files: PyTorch's and safetensors, told apart by content."""

import zipfile
from pathlib import Path

import numpy as np

from adadfq_jax.errors import InputError
from adadfq_jax.teacher import safetensors_file, torch_file


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name, of a safetensors or a PyTorch file; by content, not by name.

    Raises:
      InputError: there is no such file, or it is neither of the two, or damaged.
    """
    if path.is_dir():
        raise InputError(
            f"{path}: it is a folder; teacher.path must name P's file in it"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file; teacher.path must name P's file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if not is_safetensors(path):
        return torch_file.read(path)
    try:
        arrays, _ = safetensors_file.read(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    arrays = {name: torch_file.as_float32(array) for name, array in arrays.items()}
    return torch_file.without_module(arrays)


def is_safetensors(path: Path) -> bool:
    """Whether a file starts as safetensors do: a length and a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def file_kind(path: Path) -> str:
    """'safetensors', or the form of a PyTorch checkpoint; of a file that was read."""
    if is_safetensors(path):
        return "safetensors"
    return f"PyTorch checkpoint ({'zip' if zipfile.is_zipfile(path) else 'legacy'})"
