"""Reading the pickle of a PyTorch checkpoint without PyTorch and without running it.

A pickle is a program. This module knows only the instructions and the few names that a
state dict needs, and none of them runs code of the file. It also refuses what would
take far more time or memory than the size of the file suggests: keys that are slow to
hash, very long numbers, and chains of objects that each hold the one before twice.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from adadfq_jax.errors import short

MAX_DIMENSIONS = 32  # dimensions of a tensor
MAX_KEY = 64  # characters in the name of a storage; PyTorch writes a number
MAX_NUMBER = 16  # bytes of an integer; the magic number of legacy files has 10
MAX_LINE = 24  # characters of an integer that Python 2 wrote as text
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


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _rebuild_tensor(storage, offset, shape, strides, *_):
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


def _empty_dictionary(*arguments):
    # With arguments it would copy them, which a pickle could repeat without end.
    if arguments:
        raise pickle.UnpicklingError("an OrderedDict made of something")
    return collections.OrderedDict()


def _size(numbers=()):
    if len(numbers) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"a size of {len(numbers)} dimensions")
    return tuple(numbers)


def storage_key(key: Any) -> str:
    """Return the name of a storage; refuse other keys, which may be slow to hash."""
    if type(key) is not str or not 0 < len(key) <= MAX_KEY:
        raise pickle.UnpicklingError("a storage of impossible name")
    return key


def _check_key(key: Any) -> None:
    """Refuse keys of a dictionary that may be slow to hash or may collide."""
    known = key is None or type(key) in (str, bytes, bool, float)
    if not known and not (type(key) is int and abs(key) < 2**63):
        raise pickle.UnpicklingError(f"a {type(key).__name__} as a key; {ADVICE}")


# The instructions that picklers of any protocol write for a state dict, without DUP.
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING
    SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
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
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

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
            f"it asks for {short(f'{module}.{name}')}, which a state dict does not"
            f" need; {ADVICE}"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _, size, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("an unknown kind of storage")
        if not _is_count(size) or any(v is not None for v in view):
            raise pickle.UnpicklingError("a storage of impossible size")
        storage = Storage(storage_key(key), storage_type.dtype, size)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError(f"two declarations of storage {short(key)}")
        return storage

    def _int(self) -> None:
        line = self.readline()
        if len(line) > MAX_LINE:
            raise pickle.UnpicklingError("a number of too many digits")
        known = {b"00\n": False, b"01\n": True}  # a bool at protocol 0 and 1
        self.stack.append(known[line] if line in known else int(line))

    def _long(self) -> None:
        data = self.read(self.read(1)[0])
        if len(data) > MAX_NUMBER:
            raise pickle.UnpicklingError("a number of too many bytes")
        self.stack.append(pickle.decode_long(data))

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError("keys of no dictionary")
        for key in items[::2]:
            _check_key(key)
        target.update(zip(items[::2], items[1::2], strict=True))

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _build(self) -> None:
        # PyTorch stores the versions of the modules as an attribute of the state dict.
        # They are dropped: BUILD could set any attribute of an object.
        self.stack.pop()
        if not isinstance(self.stack[-1], collections.OrderedDict):
            raise pickle.UnpicklingError("attributes of no dictionary")

    dispatch.update(
        {
            pickle.INT[0]: _int,
            pickle.LONG1[0]: _long,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
            pickle.BUILD[0]: _build,
        }
    )


def load(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle of a file, and leave the file's position at its end.

    Returns:
      The object, and the storages that its tensors refer to, by key.

    Raises:
      one of ERRORS: the pickle is damaged, or needs what no state dict needs.
    """
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages
