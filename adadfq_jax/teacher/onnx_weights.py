"""Reading the tensors of an ONNX file, after a check of their sizes.

Nothing is allocated that the bytes of the files do not fill. External data is read from
regular files beside the ONNX file alone.
"""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from adadfq_jax.errors import InputError, first_line, short

_FIELDS = {  # where numbers are that are not raw bytes, by type
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    **dict.fromkeys(
        (
            TensorProto.FLOAT16,
            TensorProto.BFLOAT16,
            TensorProto.INT32,
            TensorProto.INT16,
            TensorProto.INT8,
            TensorProto.UINT16,
            TensorProto.UINT8,
            TensorProto.BOOL,
        ),
        "int32_data",
    ),
    **dict.fromkeys((TensorProto.UINT32, TensorProto.UINT64), "uint64_data"),
}
FLOATS = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
)


class Tensors:
    """A reader of the tensors of one ONNX file.

    Args:
      folder: the folder of the file.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._left: dict[str, int] = {}  # bytes of each external file not yet read

    def read(self, tensor: Any) -> np.ndarray:
        """Read a tensor, floating-point numbers as float32.

        Raises:
          InputError: its type cannot be read, or its numbers are not all there.
        """
        name, shape = short(tensor.name or "a tensor"), tuple(tensor.dims)
        if tensor.data_type not in _FIELDS:
            kinds = {number: kind for kind, number in TensorProto.DataType.items()}
            kind = kinds.get(tensor.data_type, tensor.data_type)
            raise InputError(f"{name} is of type {kind}, which cannot be read")
        if min(shape, default=0) < 0:
            raise InputError(f"{name} has the shape {shape}")
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        count = math.prod(shape)
        size = count * dtype.itemsize
        content = None
        if tensor.data_location == TensorProto.EXTERNAL:
            content = self._external(tensor, name, size)
        elif tensor.HasField("raw_data"):
            content = tensor.raw_data  # a copy at each access
        if content is None:
            found = len(getattr(tensor, _FIELDS[tensor.data_type]))
        else:
            found = len(content) // dtype.itemsize
        if found != count or (content is not None and len(content) != size):
            raise InputError(
                f"{name}: {found} numbers, but its shape is {shape}; the file is"
                " damaged"
            )
        try:
            if content is None:
                array = numpy_helper.to_array(tensor)
            else:
                array = np.frombuffer(content, dtype.newbyteorder("<")).reshape(shape)
        except (OverflowError, TypeError, ValueError) as error:
            said = first_line(error)
            raise InputError(f"{name}: it cannot be read ({said})") from error
        if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16:
            with np.errstate(over="ignore"):
                return np.asarray(array, np.float32)
        return array.astype(bool if array.dtype == bool else np.int64)

    def _external(self, tensor: Any, name: str, size: int) -> bytes:
        """Read a tensor's bytes from the file beside the ONNX file that it names."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        plain = Path(location).name == location and location.isprintable()
        if not plain or location in ("", ".", "..") or "\\" in location:
            raise InputError(
                f"{name} is in {short(repr(location))}; only a file in the folder of"
                " the ONNX file, given by its bare name, is read"
            )
        path = self._folder / location
        if not path.is_file():
            raise InputError(
                f"{name} is in {short(location)}, which is not beside the ONNX file;"
                " copy it there, or export with external_data=False"
            )
        there = path.stat().st_size
        try:
            begin = int(entries.get("offset", 0))
            length = int(entries.get("length", size))
        except ValueError:
            begin = length = -1
        left = self._left.setdefault(location, there) - size
        if begin < 0 or length != size or begin + size > there or left < 0:
            raise InputError(
                f"{name}: its {size:,} bytes are not within {short(location)} of"
                f" {there:,} bytes"
            )
        self._left[location] = left
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(size)
