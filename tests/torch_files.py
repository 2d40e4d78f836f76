"""PyTorch files by hand, as torch.save writes them: any objects around any tensors."""

import collections
import io
import pickle
import struct
import zipfile
from typing import Any, ClassVar, NamedTuple

import numpy as np

from adadfq_jax.teacher.torch_file import LEGACY_MAGIC, LEGACY_PROTOCOL


class Tensor(NamedTuple):
    """Pickles as a tensor of these numbers.

    kind: '', or 'parameter', 'with state' or 'subclass' as forms of an nn.Parameter.
    """

    array: Any
    kind: str = ""


class Named(NamedTuple):
    """Pickles as a reference to a class or function, which need not exist here."""

    name: str  # module and name, with a blank between them


class Made(NamedTuple):
    """Pickles as what a function or class makes of arguments.

    how: instruction, of REDUCE, NEWOBJ, OBJ and INST. state: its attributes. items: of
    a dictionary, elements: of a list.
    """

    name: str
    arguments: tuple = ()
    state: Any = None
    items: Any = None
    elements: Any = None
    how: str = "REDUCE"


class Storage(NamedTuple):
    """Pickles as a reference to numbers that stand in the file under a key."""

    kind: str
    key: str
    size: int


KINDS = {
    "float32": "Float",
    "float64": "Double",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "uint8": "Byte",
}


class Pickler(pickle._Pickler):
    """Writes such objects, and keeps the numbers of the tensors by key."""

    def __init__(self, file, protocol=2):
        super().__init__(file, protocol)
        self.data: dict[str, np.ndarray] = {}

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            kind = Named(f"torch {obj.kind}Storage")
            return ("storage", kind, obj.key, "cpu", obj.size)
        return None

    def save_named(self, obj):
        module, name = obj.name.split(" ")
        self.write(f"c{module}\n{name}\n".encode())

    def save_made(self, obj):
        if obj.how == "INST":
            self.write(pickle.MARK)
            for argument in obj.arguments:
                self.save(argument)
            self.write(b"i" + obj.name.replace(" ", "\n").encode() + b"\n")
        elif obj.how == "OBJ":
            self.write(pickle.MARK)
            self.save(Named(obj.name))
            for argument in obj.arguments:
                self.save(argument)
            self.write(pickle.OBJ)
        else:
            self.save(Named(obj.name))
            self.save(obj.arguments)
            self.write(getattr(pickle, obj.how))
        if obj.items is not None:
            self._batch_setitems(iter(obj.items.items()))
        if obj.elements is not None:
            self._batch_appends(iter(obj.elements))
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def save_tensor(self, obj):
        array = np.ascontiguousarray(obj.array)
        key = str(len(self.data))
        self.data[key] = array
        strides = tuple(s // array.itemsize for s in array.strides)
        arguments = (Storage(KINDS[array.dtype.name], key, array.size), 0)
        rest = (np.shape(obj.array), strides[: np.ndim(obj.array)], False)
        hooks = collections.OrderedDict()
        name = "torch._utils _rebuild_tensor_v2"
        arguments = (*arguments, *rest, hooks)
        made = Made(name, arguments)
        if obj.kind == "parameter":
            made = Made("torch._utils _rebuild_parameter", (made, True, hooks))
        elif obj.kind == "with state":
            name = "torch._utils _rebuild_parameter_with_state"
            made = Made(name, (made, True, hooks, {"a": 1}))
        elif obj.kind == "subclass":
            kind = Named("torch.nn.parameter Parameter")
            made = Made(
                "torch._tensor _rebuild_from_type_v2",
                (Named(name), kind, arguments, {}),
            )
        self.save_made(made)

    dispatch: ClassVar = {
        **pickle._Pickler.dispatch,
        Named: save_named,
        Made: save_made,
        Tensor: save_tensor,
    }


def pickled(root, protocol=2):
    """The pickle of objects and the numbers of its tensors, by key."""
    file = io.BytesIO()
    pickler = Pickler(file, protocol)
    pickler.dump(root)
    return file.getvalue(), pickler.data


def save(path, root, *, legacy=False, protocol=2):
    """Write objects as torch.save does, in today's form or in that before 1.6.

    path: a path, or a file that is open, for today's form.
    """
    content, data = pickled(root, protocol)
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
            for key, array in data.items():
                archive.writestr(f"archive/data/{key}", array.tobytes())
        return path
    system = {"protocol_version": LEGACY_PROTOCOL, "little_endian": True}
    start = [pickle.dumps(x, 2) for x in (LEGACY_MAGIC, LEGACY_PROTOCOL, system)]
    keys = pickle.dumps(sorted(data), 2)
    numbers = [
        struct.pack("<q", data[k].size) + data[k].tobytes() for k in sorted(data)
    ]
    path.write_bytes(b"".join([*start, content, keys, *numbers]))
    return path


def tensors(state_dict, prefix="", **kwargs):
    """A state dict of tensors, with a prefix before every key."""
    return collections.OrderedDict(
        (prefix + name, Tensor(array, **kwargs)) for name, array in state_dict.items()
    )
