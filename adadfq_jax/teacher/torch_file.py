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
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from adadfq_jax.errors import InputError, short
from adadfq_jax.teacher import torch_pickle
from adadfq_jax.teacher.torch_pickle import Placeholder, Storage, Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_DEPTH = 50  # mappings and lists around a tensor
MAX_ENTRIES = 100_000  # in all of them; a checkpoint has a few thousand
MAX_NAME = 1000  # characters of the keys around a tensor


class Contents(NamedTuple):
    """What a file of P holds.

    Attributes:
      entries: everything in it by its keys, joined by dots: whatever has a `shape` is a
        tensor; a string says what else is there.
      arrays: names of tensors -> the arrays.
    """

    entries: Mapping[str, Any]
    arrays: Callable[[Iterable[str]], dict[str, np.ndarray]]


def read(path: Path) -> Contents:
    """Read a PyTorch file, with its tensors from every mapping and list in it.

    Raises:
      InputError: the file is not a PyTorch checkpoint, is damaged, or is a module
        rather than its weights.
    """
    content = path.read_bytes()

    def named(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (*torch_pickle.ERRORS, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path}: not a PyTorch checkpoint that can be read"
                f" ({short(str(error), 300) or type(error).__name__})"
            ) from error

    def contents() -> tuple[dict[str, Any], Arrays]:
        is_zip = zipfile.is_zipfile(io.BytesIO(content))
        root, array_of = (_read_zip if is_zip else _read_legacy)(content)
        found: dict[str, Any] = {}
        for name, item in _entries(root):
            if isinstance(found.get(name), Tensor) and found[name] != item:
                raise InputError(f"two tensors are named {short(name)}")
            found[name] = item
        return found, array_of

    entries, array_of = named(contents)

    def arrays(names: Iterable[str]) -> dict[str, np.ndarray]:
        chosen = {name: entries[name] for name in names}
        numbers = sum(math.prod(tensor.shape) for tensor in chosen.values())
        if numbers > len(content):
            raise InputError(f"tensors of {numbers} numbers in {len(content)} bytes")
        return {name: _view(tensor, array_of) for name, tensor in chosen.items()}

    return Contents(entries, functools.partial(named, arrays))


def _entries(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield everything that lies in nested mappings and lists, by its keys.

    Raises:
      InputError: the root is neither, or they hold each other too often or too deep.
    """
    is_object = isinstance(root, Placeholder) and (root.is_module or not root)
    if is_object or not _is_nest(root):
        raise InputError(f"{_what(root)}, not weights; {torch_pickle.ADVICE}")
    count = 0
    pending: list[tuple[str, Any, tuple[int, ...]]] = [("", root, ())]
    while pending:
        name, item, inside = pending.pop()
        if name and not (type(item) is dict or isinstance(item, OrderedDict)):
            yield name, item if isinstance(item, Tensor) else _what(item)
        if not _is_nest(item) or id(item) in inside:
            continue
        items = [
            (key, value)
            for key, value in (
                item.items() if isinstance(item, dict) else enumerate(item)
            )
            if _is_nest(value) or isinstance(value, Tensor) or type(key) is str
        ]
        count += len(items)
        if count > MAX_ENTRIES or len(inside) > MAX_DEPTH:
            raise InputError(
                "its mappings and lists hold each other too often; "
                + torch_pickle.ADVICE
            )
        for key, value in reversed(items):
            whole = f"{name}.{key}" if name else str(key)
            if len(whole) <= MAX_NAME or not _is_nest(value):
                pending.append((whole, value, (*inside, id(item))))


def _is_nest(item: Any) -> bool:
    return isinstance(item, dict) or type(item) in (list, tuple)


def _what(item: Any) -> str:
    """Name the kind of an object that a pickle holds."""
    name = type(item).__name__
    if isinstance(item, Placeholder | torch_pickle.Unknown):
        name = short(item.name)
    if getattr(item, "is_module", False):
        return f"a whole pickled module {name}"
    return f"{'an' if name[:1] in tuple('AEIOUaeio') else 'a'} {name}"


Arrays = Callable[[Storage], np.ndarray]


def _read_zip(content: bytes) -> tuple[Any, Arrays]:
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(
            "a TorchScript program (torch.jit.save), which is code; "
            + torch_pickle.ADVICE
        )
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        some = ", ".join(map(short, names[:3]))
        raise InputError(f"a zip archive of {some}, but not one that PyTorch wrote")
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
    start = torch_pickle.load(file)[0]
    if start != LEGACY_MAGIC:
        raise InputError(
            f"not a PyTorch checkpoint, but a pickle of {_what(start)};"
            f" {torch_pickle.ADVICE}"
        )
    if torch_pickle.load(file)[0] != LEGACY_PROTOCOL:
        raise InputError("not a PyTorch checkpoint")
    if not torch_pickle.load(file)[0].get("little_endian", False):
        raise InputError("big-endian, only little-endian is read")
    root, declared = torch_pickle.load(file)
    keys, _ = torch_pickle.load(file)
    found = {}
    for key in map(torch_pickle.storage_key, keys):
        (count,) = struct.unpack("<q", file.read(8))
        storage = declared.get(key)
        if storage is None or storage.size != count or storage.dtype is None:
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
