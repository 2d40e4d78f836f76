"""Reading the pickle of a PyTorch checkpoint without PyTorch and without running it.

A pickle is a program. This module knows only the instructions that picklers write, and
the few names that a tensor needs. Whatever else a file names becomes a `Placeholder`:
nothing is imported, and nothing of the file runs. What would take far more time or
memory than the size of the file suggests is dropped or refused: keys that are slow to
hash, very long numbers, and chains of objects that each hold the one before twice.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from adadfq_jax.errors import short

MAX_DIMENSIONS = 32  # dimensions of a tensor
MAX_KEY = 64  # characters in the name of a storage; PyTorch writes a number
MAX_NUMBER = 16  # bytes of an integer; the magic number of legacy files has 10
MAX_LINE = 24  # characters of an integer that Python 2 wrote as text
MAX_COPIED = 100_000  # items of dictionaries that are made of lists of them
ADVICE = "torch.save(model.state_dict(), FILE) writes the weights alone"

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
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "QInt8Storage": np.int8,
    "QUInt8Storage": np.uint8,
    "QInt32Storage": np.int32,
    "UntypedStorage": np.uint8,
}

# Errors that the unpickler raises for a broken or hostile pickle.
ERRORS = (
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


class Storage(NamedTuple):
    """The declaration of a flat array, of which tensors are views."""

    key: str
    dtype: Any
    size: int


class Tensor(NamedTuple):
    """A view of a storage; whether it lies within the storage is not yet checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unknown(NamedTuple):
    """A class or function that a file names; it is neither imported nor called."""

    name: str


class Placeholder(dict[Any, Any]):
    """An object of an unknown class, inert.

    It holds the items that the file puts into it, since it may be a dictionary of
    someone's own, but none of its attributes.

    Attributes:
      name: of the class.
      is_module: whether its attributes were those of a PyTorch module.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name, self.is_module = name, False


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _rebuild_tensor(storage, offset, shape, strides, *_):
    if isinstance(storage, Placeholder):
        return storage
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    if max(len(shape), len(strides)) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor of impossible shape")
    if len(shape) != len(strides) or not all(
        map(_is_count, (offset, *shape, *strides))
    ):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    if not _is_count(math.prod(shape)):
        raise pickle.UnpicklingError("a tensor of impossible size")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_):
    return tensor


def _rebuild_from_type(function, kind, arguments, *_):
    if function is _rebuild_tensor:
        return _rebuild_tensor(*arguments)
    return Placeholder(kind.name if isinstance(kind, Unknown) else "a tensor")


def _dictionary(pairs=()):
    return collections.OrderedDict(
        (key, value) for key, value in pairs if _is_plain(key)
    )


def _size(numbers=()):
    if len(numbers) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"a size of {len(numbers)} dimensions")
    return tuple(numbers)


def storage_key(key: Any) -> str:
    """Return the name of a storage; refuse other keys, which may be slow to hash."""
    if type(key) is not str or not 0 < len(key) <= MAX_KEY:
        raise pickle.UnpicklingError("a storage of impossible name")
    return key


def _is_plain(key: Any) -> bool:
    """Tell whether a key of a dictionary is quick to hash and cannot collide."""
    known = key is None or type(key) in (str, bytes, bool, float)
    return known or (type(key) is int and abs(key) < 2**63)


# The functions that a tensor needs; they run in place of PyTorch's.
_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): _size,
}

# The instructions that picklers of any protocol write, without DUP, which none writes,
# and without those of extensions and of buffers beside the file.
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
    MEMOIZE NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT FLOAT STRING UNICODE
    BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST
    EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID
"""


class _Table(dict[int, Callable[[Any], None]]):
    """The known instructions by code; a lookup of another one is an error."""

    def __missing__(self, code: int) -> Any:
        names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        name = names.get(chr(code), f"instruction {code}")
        raise pickle.UnpicklingError(
            f"it has {name}, which a state dict does not need; {ADVICE}"
        )


class _Unpickler(pickle._Unpickler):
    """An unpickler that knows only the instructions and names of a state dict.

    It derives from the unpickler written in Python, because that has a table of
    instructions that can be replaced.

    Attributes:
      storages: the storages that tensors refer to, by key.
      copied: number of items of dictionaries that were made of lists of them.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _Table(
        (code, pickle._Unpickler.dispatch[code])
        for code in (getattr(pickle, name)[0] for name in _INSTRUCTIONS.split())
    )

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages: dict[str, Storage] = {}
        self.copied = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        return Unknown(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, *others = pid
        if kind == "module":  # the class of a module, which old files wrote with it
            return storage_type
        key, _, size, *view = others
        if kind != "storage":
            raise pickle.UnpicklingError("an unknown kind of storage")
        if not _is_count(size) or any(v is not None for v in view):
            raise pickle.UnpicklingError("a storage of impossible size")
        known = isinstance(storage_type, _StorageType)
        dtype = storage_type.dtype if known else None
        storage = Storage(storage_key(key), dtype, size)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError(f"two declarations of storage {short(key)}")
        return storage if known else _inert(storage_type)

    def _number(self, text: bytes) -> None:
        """Push an integer that is written as text."""
        known = {b"00\n": False, b"01\n": True}  # a bool at protocol 0 and 1
        if len(text) > MAX_LINE:
            self.stack.append(Placeholder("int"))
        else:
            digits = text.rstrip(b"L\n")
            self.stack.append(known[text] if text in known else int(digits))

    def _bytes(self, size: int, as_number: bool = False) -> None:
        """Push bytes or the integer that they are, unless that is a very long one."""
        data = self.read(size)
        if not as_number:
            self.stack.append(data)
        elif len(data) <= MAX_NUMBER:
            self.stack.append(pickle.decode_long(data))
        else:
            self.stack.append(Placeholder("int"))

    def _size(self, size: int, form: str) -> int:
        return struct.unpack(form, self.read(size))[0]

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError("keys of no dictionary")
        # No name of a tensor is among the keys that are dropped.
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _is_plain(key):
                target[key] = value

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise pickle.UnpicklingError("elements of no list")

    def _set_of_items(self) -> None:
        self.pop_mark()  # they may be slow to hash
        self.stack.append(Placeholder("frozenset"))

    def _build(self) -> None:
        # Attributes are dropped: BUILD could set any attribute of an object.
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Placeholder) and isinstance(state, dict):
            target.is_module = "_modules" in state

    def _call(self, function: Any, arguments: Any) -> None:
        """Push the result of a function of `_KNOWN`, or a placeholder for another's."""
        if function is _dictionary and arguments:
            # Python 2 wrote the items so. A pickle could repeat this without end.
            self.copied += len(arguments[0])
            if self.copied > MAX_COPIED:
                raise pickle.UnpicklingError("dictionaries made of others")
        if any(function is known for known in _KNOWN.values()):
            self.stack.append(function(*arguments))
        else:
            self.stack.append(_inert(function))

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self._call(self.stack.pop(), arguments)

    def _new_object(self, others: int) -> None:
        del self.stack[len(self.stack) - others :]
        self._call(self.stack.pop(), ())

    def _old_object(self, function: Any = None) -> None:
        items = self.pop_mark()
        self._call(items[0] if function is None else function, ())

    def _old_instance(self) -> None:
        module, name = (self.readline()[:-1].decode() for _ in range(2))
        self._old_object(self.find_class(module, name))

    dispatch.update(
        {
            getattr(pickle, name)[0]: function
            for name, function in {
                "INT": lambda self: self._number(self.readline()),
                "LONG": lambda self: self._number(self.readline()),
                "LONG1": lambda self: self._bytes(self._size(1, "<B"), True),
                "LONG4": lambda self: self._bytes(self._size(4, "<I"), True),
                "BYTEARRAY8": lambda self: self._bytes(
                    min(self._size(8, "<Q"), sys.maxsize)
                ),
                "SETITEM": lambda self: self._set(_popped(self.stack, 2)),
                "SETITEMS": lambda self: self._set(self.pop_mark()),
                "DICT": _dict,
                "APPEND": lambda self: self._append(_popped(self.stack, 1)),
                "APPENDS": lambda self: self._append(self.pop_mark()),
                "EMPTY_SET": lambda self: self.stack.append(Placeholder("set")),
                "ADDITEMS": lambda self: self._append(self.pop_mark()),
                "FROZENSET": _set_of_items,
                "BUILD": _build,
                "REDUCE": _reduce,
                "NEWOBJ": lambda self: self._new_object(1),
                "NEWOBJ_EX": lambda self: self._new_object(2),
                "OBJ": _old_object,
                "INST": _old_instance,
            }.items()
        }
    )


def _popped(stack: list[Any], count: int) -> list[Any]:
    taken = stack[-count:]
    del stack[-count:]
    return taken


def _inert(function: Any) -> Placeholder:
    """Return a placeholder for what a class or function of the file would make."""
    named = isinstance(function, Unknown | Placeholder)
    return Placeholder(function.name if named else type(function).__name__)


def load(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle of a file, and leave the file's position at its end.

    Returns:
      The object, and the storages that its tensors refer to, by key.

    Raises:
      one of ERRORS: the pickle is damaged, or needs what no state dict needs.
    """
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages
