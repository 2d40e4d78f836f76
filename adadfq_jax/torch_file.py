"""Reads PyTorch checkpoints (`.pth`, `.pt`, `.th`; zip and legacy) without PyTorch.

Such a file is a pickle beside raw tensor data, and a pickle can run any code. Here
only the few names that a state dict needs are resolved, none of which runs anything
of the file's; any other name is refused. Declared sizes, strides and offsets are
checked against the data that is there, and nothing that a file declares makes more
memory than a few times its size.
"""

import collections
import functools
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from adadfq_jax.errors import InputError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_DEPTH = 4  # of the dictionaries around a state dict
MAX_DIMENSIONS = 32  # of a tensor

_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

# What a broken or hostile pickle makes the standard unpickler raise.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    UnicodeError,
    ValueError,
    struct.error,
)


class _StorageType(NamedTuple):
    dtype: Any


class _Storage(NamedTuple):
    """A flat array that tensors are views of, still to be filled in legacy files."""

    key: str
    dtype: Any
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_):
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    if max(len(shape), len(strides)) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor of impossible shape")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_):
    return tensor


def _empty_dictionary(*arguments):
    # With arguments it would copy them, as often as a pickle likes.
    if arguments:
        raise pickle.UnpicklingError("an OrderedDict made of something")
    return collections.OrderedDict()


def _size(numbers=()):
    if len(numbers) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"a size of {len(numbers)} dimensions")
    return tuple(numbers)


class _Unpickler(pickle.Unpickler):
    """Resolves the names of a state dict and no others.

    storages: those that tensors refer to, by key.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _empty_dictionary
        if module == "torch._utils" and name in (
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
        ):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if (module, name) == ("torch", "Size"):
            return _size
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which a state dict does not need"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("an unknown kind of storage")
        if type(size) is not int or size < 0 or any(v is not None for v in view):
            raise pickle.UnpicklingError("a storage of impossible size")
        storage = _Storage(str(key), storage_type.dtype, size)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError(f"two declarations of storage {storage.key!r}")
        return storage


def _unpickle(file: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
    """One pickle of a file, which is left where it ends; its storages by key."""
    start = file.tell()
    # The unpickler makes room for whatever number a pickle remembers an object by,
    # and for any length that it declares: all are looked at before.
    for count, (opcode, number, _) in enumerate(pickletools.genops(file)):
        if "PUT" in opcode.name and (number is None or not 0 <= number <= count):
            raise pickle.UnpicklingError(f"it remembers an object by {number}")
    file.seek(start)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages


def read(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a PyTorch file, as numpy arrays by name.

    A dictionary around it (`state_dict`, `model`) is opened, `module.` before every
    name is dropped, and what is no tensor is left out.

    Raises:
      InputError: the file is no PyTorch checkpoint, is damaged, or asks for code.
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
    except (*_PICKLE_ERRORS, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: not a PyTorch checkpoint that can be read ({error})"
        ) from error
    return without_module(tensors)


def without_module(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drops the `module.` that data-parallel training puts before every name."""
    if not all(name.startswith("module.") for name in arrays):
        return arrays
    return {name.removeprefix("module."): array for name, array in arrays.items()}


Arrays = Callable[[_Storage], np.ndarray]


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
            raise InputError(f"byte order {order!r}, only little-endian is read")
    root, declared = _unpickle(io.BytesIO(archive.read(pickles[0])))
    there = {n for n in archive.namelist() if n.startswith(f"{folder}data/")}
    if there != {f"{folder}data/{key}" for key in declared}:
        raise InputError("its storages are not those that tensors refer to")

    @functools.cache
    def array(storage: _Storage) -> np.ndarray:
        return _from_bytes(archive.read(f"{folder}data/{storage.key}"), storage)

    return root, array


def _read_legacy(content: bytes) -> tuple[Any, Arrays]:
    file = io.BytesIO(content)
    if _unpickle(file)[0] != LEGACY_MAGIC or _unpickle(file)[0] != LEGACY_PROTOCOL:
        raise InputError("not a PyTorch checkpoint")
    if not _unpickle(file)[0].get("little_endian", False):
        raise InputError("big-endian, only little-endian is read")
    root, declared = _unpickle(file)
    keys, _ = _unpickle(file)
    found = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        storage = declared.get(key)
        if storage is None or storage.size != count:
            raise InputError(f"storage {key!r} is not the one that tensors refer to")
        data = file.read(count * np.dtype(storage.dtype).itemsize)
        found[key] = _from_bytes(data, storage)
    if file.read(1):
        raise InputError("more data than its tensors have")
    return root, lambda storage: found[storage.key]


def _from_bytes(data: bytes, storage: _Storage) -> np.ndarray:
    if len(data) != storage.size * np.dtype(storage.dtype).itemsize:
        raise InputError(
            f"storage {storage.key!r} has {len(data)} bytes, which are not"
            f" {storage.size} numbers"
        )
    return np.frombuffer(data, storage.dtype)


def _view(tensor: _Tensor, arrays: Arrays) -> np.ndarray:
    """The tensor's own copy of its part of a storage, bounds checked."""
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
            " repeats numbers, which no whole tensor does"
        )
    strides = [stride * flat.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, strides, writeable=False
    )
    return as_float32(view.copy())


def as_float32(array: np.ndarray) -> np.ndarray:
    """A bfloat16 array as float32, exactly; any other as it is."""
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def _is_dense(tensor: _Tensor) -> bool:
    """Whether it has every number of its part of the storage once, in any order."""
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


def _find_state_dict(root: Any, depth: int = 0) -> dict[str, _Tensor]:
    """The outermost dictionary with tensors, looking into `state_dict` and `model`."""
    if not isinstance(root, Mapping):
        raise InputError(
            "it holds no state dict (save model.state_dict(), not the model)"
        )
    # The dictionary first: beside it there may be tensors, as PyTorch's own ImageNet
    # example has best_acc1 in one.
    for key in ("state_dict", "model", "net"):
        if isinstance(root.get(key), Mapping) and depth < MAX_DEPTH:
            return _find_state_dict(root[key], depth + 1)
    tensors = {k: v for k, v in root.items() if isinstance(v, _Tensor)}
    if tensors:
        return {str(name): tensor for name, tensor in tensors.items()}
    raise InputError(f"no tensors in it; its keys are {sorted(map(str, root))[:8]}")
