"""The pickle of a PyTorch checkpoint, read without PyTorch and without running it.

A pickle is a program. Here only the instructions and the few names that a state dict
needs are known, and none of them runs anything of the file's. What costs more than the
file's size says is refused: keys whose hash is long in coming, numbers of many bytes,
an object that is made of itself twice, over and over.
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

MAX_DIMENSIONS = 32  # of a tensor
MAX_KEY = 64  # characters in the name of a storage: a number, as PyTorch writes it
MAX_NUMBER = 16  # bytes of an integer; the legacy form's magic number has 10
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

# What a broken or hostile pickle makes the unpickler raise.
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
    """A flat array that tensors are views of, still to be filled in legacy files."""

    key: str
    dtype: Any
    size: int


class Tensor(NamedTuple):
    """A view of a storage; that it is within is still to be checked."""

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
    # With arguments it would copy them, as often as a pickle likes.
    if arguments:
        raise pickle.UnpicklingError("an OrderedDict made of something")
    return collections.OrderedDict()


def _size(numbers=()):
    if len(numbers) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"a size of {len(numbers)} dimensions")
    return tuple(numbers)


def storage_key(key: Any) -> str:
    """The name of a storage, if it can be one: anything else may take long to hash."""
    if type(key) is not str or not 0 < len(key) <= MAX_KEY:
        raise pickle.UnpicklingError("a storage of impossible name")
    return key


def _check_key(key: Any) -> None:
    """Refuses keys of a dictionary whose hash may never come, or be another's."""
    known = key is None or type(key) in (str, bytes, bool, float)
    if not known and not (type(key) is int and abs(key) < 2**63):
        raise pickle.UnpicklingError(f"a {type(key).__name__} as a key; {ADVICE}")


# What picklers write for a state dict at any protocol; none writes DUP.
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING
    SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""


class _Table(dict[int, Callable[[Any], None]]):
    """Instructions by code; of others it says the name."""

    def __missing__(self, code: int) -> Any:
        names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        name = names.get(chr(code), f"instruction {code}")
        raise pickle.UnpicklingError(
            f"it has {name}, which a state dict does not need; {ADVICE}"
        )


class _Unpickler(pickle._Unpickler):
    """Knows the instructions and names of a state dict and no others.

    It is Python's unpickler in Python, whose table of instructions can be another's.

    storages: those that tensors refer to, by key.
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
        # The versions of the modules, which PyTorch keeps as an attribute. Of anything
        # else it would set what the file likes.
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
    """One pickle of a file, which is left where it ends; its storages by key.

    Raises:
      one of ERRORS: it is damaged, or asks for what no state dict needs.
    """
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages
