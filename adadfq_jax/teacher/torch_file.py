"""Reading PyTorch checkpoints (`.pth`, `.pt`, `.th`; zip and legacy) without PyTorch.

Such a file consists of a pickle and raw tensor data. `torch_pickle` reads the pickle
and runs nothing in it. This module checks the declared sizes, strides and offsets
against the actual data. Whatever a file declares, reading it takes at most a few times
its size in memory.
"""

import functools
import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from adadfq_jax.errors import InputError, short
from adadfq_jax.teacher import torch_pickle
from adadfq_jax.teacher.torch_pickle import Storage, Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_DEPTH = 4  # largest number of dictionaries around a state dict
# Keys under which training scripts store the state dict in another dictionary.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the state dict of a PyTorch file as numpy arrays, by name.

    The state dict may be inside other dictionaries, under a key of `WRAPPERS`. If all
    names begin with `module.`, that is dropped. Values that are not tensors are left
    out.

    Raises:
      InputError: the file is not a PyTorch checkpoint, is damaged, or needs code to be
        run.
    """
    try:
        content = path.read_bytes()
        if zipfile.is_zipfile(io.BytesIO(content)):
            root, arrays = _read_zip(content)
        else:
            root, arrays = _read_legacy(content)
        state_dict = _find_state_dict(root)
        numbers = sum(math.prod(t.shape) for t in state_dict.values())
        if numbers > len(content):
            raise InputError(f"tensors of {numbers} numbers in {len(content)} bytes")
        tensors = {name: _view(t, arrays) for name, t in state_dict.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (*torch_pickle.ERRORS, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: not a PyTorch checkpoint that can be read"
            f" ({short(str(error), 300)})"
        ) from error
    return without_module(tensors)


def without_module(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop the `module.` that data-parallel training puts before every name."""
    if not all(name.startswith("module.") for name in arrays):
        return arrays
    return {name.removeprefix("module."): array for name, array in arrays.items()}


Arrays = Callable[[Storage], np.ndarray]


def _read_zip(content: bytes) -> tuple[Any, Arrays]:
    archive = zipfile.ZipFile(io.BytesIO(content))
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError("a zip archive, but not one that PyTorch wrote")
    folder = pickles[0].removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise InputError("a compressed zip archive, which PyTorch does not write")
    if sum(info.file_size for info in archive.infolist()) > len(content):
        raise InputError("a zip archive whose entries overlap")
    if f"{folder}byteorder" in archive.namelist():
        order = archive.read(f"{folder}byteorder")
        if order != b"little":
            raise InputError(f"byte order {order[:20]!r}, only little-endian is read")
    root, declared = torch_pickle.load(io.BytesIO(archive.read(pickles[0])))
    there = {n for n in archive.namelist() if n.startswith(f"{folder}data/")}
    if there != {f"{folder}data/{key}" for key in declared}:
        raise InputError("its storages are not those that its tensors refer to")

    @functools.cache
    def array(storage: Storage) -> np.ndarray:
        return _from_bytes(archive.read(f"{folder}data/{storage.key}"), storage)

    return root, array


def _read_legacy(content: bytes) -> tuple[Any, Arrays]:
    file = io.BytesIO(content)
    start = [torch_pickle.load(file)[0] for _ in range(2)]
    if start != [LEGACY_MAGIC, LEGACY_PROTOCOL]:
        raise InputError("not a PyTorch checkpoint")
    if not torch_pickle.load(file)[0].get("little_endian", False):
        raise InputError("big-endian, only little-endian is read")
    root, declared = torch_pickle.load(file)
    keys, _ = torch_pickle.load(file)
    found = {}
    for key in map(torch_pickle.storage_key, keys):
        (count,) = struct.unpack("<q", file.read(8))
        storage = declared.get(key)
        if storage is None or storage.size != count:
            raise InputError(f"storage {key!r} is not the one that tensors refer to")
        data = file.read(count * np.dtype(storage.dtype).itemsize)
        found[key] = _from_bytes(data, storage)
    if file.read(1):
        raise InputError("more data than its tensors have")
    return root, lambda storage: found[storage.key]


def _from_bytes(data: bytes, storage: Storage) -> np.ndarray:
    if len(data) != storage.size * np.dtype(storage.dtype).itemsize:
        raise InputError(
            f"storage {storage.key!r} has {len(data)} bytes, which are not"
            f" {storage.size} numbers"
        )
    return np.frombuffer(data, storage.dtype)


def _view(tensor: Tensor, arrays: Arrays) -> np.ndarray:
    """Copy a tensor out of its storage, after a check of the bounds."""
    flat, size = arrays(tensor.storage), math.prod(tensor.shape)
    if not size:
        return np.zeros(tensor.shape, tensor.storage.dtype)
    if tensor.offset + size > flat.size:
        raise InputError(
            f"a tensor of shape {tensor.shape} reaches beyond its {flat.size} numbers"
        )
    if not _is_dense(tensor):
        raise InputError(
            f"a tensor of shape {tensor.shape} with strides {tensor.strides} skips or"
            " repeats numbers; save it as a contiguous tensor"
        )
    strides = [stride * flat.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, strides, writeable=False
    )
    return as_float32(view.copy())


def as_float32(array: np.ndarray) -> np.ndarray:
    """Convert bfloat16 to float32, which is exact; return other arrays unchanged."""
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor has each number of its part of the storage exactly once.

    The order of the numbers does not matter.
    """
    steps = sorted(
        (stride, n)
        for n, stride in zip(tensor.shape, tensor.strides, strict=True)
        if n > 1
    )
    expected = 1
    for stride, n in steps:
        if stride != expected:
            return False
        expected *= n
    return True


def _find_state_dict(root: Any, depth: int = 0) -> dict[str, Tensor]:
    """Return the tensors of the state dict, which may lie inside `WRAPPERS`."""
    if not isinstance(root, Mapping):
        raise InputError(
            "it holds no state dict (save model.state_dict(), not the model)"
        )
    # Inner dictionaries come first, since tensors may lie beside the state dict: the
    # checkpoints of PyTorch's ImageNet example have one for best_acc1.
    for key in WRAPPERS:
        if isinstance(root.get(key), Mapping) and depth < MAX_DEPTH:
            return _find_state_dict(root[key], depth + 1)
    tensors = {k: v for k, v in root.items() if isinstance(v, Tensor)}
    if tensors:
        return {str(name): tensor for name, tensor in tensors.items()}
    keys = [short(key) for key in sorted(map(str, root))[:8]]
    raise InputError(f"no tensors in it; its keys are {keys}")
