"""The pretrained full-precision classifier P, from a safetensors or PyTorch file.

A file holds kernels OIHW and dense weights [out, in], with the names of the pytorchcv
model zoo, torchvision, timm, Hugging Face, efficientnet_pytorch or He-style scripts;
`search` finds them wherever they are in it. PyTorch can load the files that this module
writes. Names and shapes are checked strictly against the network, and nothing in a file
is ever executed.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from adadfq_jax.errors import InputError, short
from adadfq_jax.runtime import files
from adadfq_jax.teacher import hub, naming, reading, search
from adadfq_jax.teacher.search import Found


def torch_name(
    path: tuple[str, ...], model_name: str = "resnet20", scheme: str = ""
) -> str:
    """Return the state-dict key under which a variable is written.

    `scheme` is one of `naming.schemes(model_name)`, '' for that of the model's files.

    For example, ('params', 'stage1_unit1', 'conv1', 'bn', 'scale') of a ResNet becomes
    'features.stage1.unit1.body.conv1.bn.weight'.
    """
    scheme = scheme or naming.written_in(model_name)
    return naming.schemes(model_name)[scheme](naming.place(path))


def _to_flax(array: np.ndarray) -> np.ndarray:
    """Transpose OIHW to HWIO and [out, in] to [in, out]; leave vectors unchanged."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T


def _to_torch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T


def to_state_dict(
    variables: Mapping[str, Any], model_name: str = "resnet20", scheme: str = ""
) -> dict[str, np.ndarray]:
    """Convert variables {'params', 'batch_stats'} to a state dict.

    The names are those of `torch_name`, which are the same for all CIFAR ResNets.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables))
    return {
        torch_name(path, model_name, scheme): np.ascontiguousarray(
            _to_torch(np.asarray(leaf))
        )
        for path, leaf in flat.items()
    }


def recognise(entries: Mapping[str, Any] | Iterable[str]) -> Found:
    """Recognise the network of a state dict, or of its keys alone.

    Raises:
      InputError: it is not known.
    """
    if not isinstance(entries, Mapping):
        entries = dict.fromkeys(entries)
    return search.find(
        {
            name: entry if search.is_tensor(entry) else _Shape()
            for name, entry in entries.items()
        }
    )


class _Shape(NamedTuple):
    """The shape of a tensor of which only the name is known."""

    shape: tuple[int, ...] = ()


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], model_name: str = ""
) -> dict[str, Any]:
    """Convert a state dict to variables {'params', 'batch_stats'}.

    The numbers of classes and of image channels follow from the arrays' shapes.

    Args:
      state_dict: arrays by name; `num_batches_tracked` entries are ignored.
      model_name: a name of `models.names()`, or '' to recognise the network.

    Returns:
      float32 numpy arrays in the structure of the network's variables.

    Raises:
      InputError: names are missing or left over, or a shape or type is wrong.
    """
    return _variables(state_dict, search.find(state_dict, model_name))


def _variables(arrays: Mapping[str, np.ndarray], found: Found) -> dict[str, Any]:
    """Convert the arrays of a network that was found."""
    flat = naming.shapes(found.model, *_sizes(arrays, found))
    leaves = {}
    for path, name in found.names.items():
        wanted = flat[path].shape
        if not name:
            leaves[path] = np.zeros(wanted, np.float32)
            continue
        array = arrays[name]
        flipped = _to_flax(array)
        if len(wanted) == 2 and array.ndim == 4:
            # A dense layer that was written as a convolution of its whole input.
            flipped = array.reshape(len(array), -1).T
        elif len(wanted) == 4 and array.ndim == 2:
            flipped = array.T[None, None]
        if array.dtype.kind != "f" or flipped.shape != wanted:
            raise InputError(
                f"{short(name)} is {array.dtype} {array.shape}, which does not fit"
                f" {found.model} ({wanted} in Flax layout, float)"
            )
        leaves[path] = np.ascontiguousarray(flipped, np.float32)
    return flax.traverse_util.unflatten_dict(leaves)


def _sizes(
    arrays: Mapping[str, np.ndarray], found: Found
) -> tuple[int, tuple[int, int, int]]:
    """Return the number of classes and the image shape, the inputs of `naming.shapes`.

    They are read from the shapes of the last and the first kernel.
    """
    head = found.names["params", *naming.LAST]
    stem = found.names[naming.STEM]
    for name, dimensions in ((head, (2, 4)), (stem, (4,))):
        array = arrays[name]
        if array.ndim not in dimensions or not array.size:
            raise InputError(
                f"{name} is {array.dtype} {array.shape}, which is not the shape of a"
                " kernel"
            )
    return arrays[head].shape[0], (*naming.TINY[:2], arrays[stem].shape[1])


def read(
    path: str | Path, model_name: str = "", key: str = "", file: str = ""
) -> tuple[dict[str, Any], Found]:
    """Read the variables of P, and tell which network they are of.

    Args:
      path: a safetensors or PyTorch file, where `~` is the home folder, or
        hf://OWNER/NAME, see `hub`.
      model_name: a name of `models.names()`, or '' to recognise the network.
      key: keys around the weights that are meant, where a file has several sets.
      file: name of the file, which tells some networks apart; '' means that of `path`.

    Returns:
      {'params': ..., 'batch_stats': ...} of float32 numpy arrays, and the network, with
      the names of the tensors that were left out.

    Raises:
      InputError: the file is missing, unreadable or of another network.
    """
    if hub.is_hub(path):
        there = hub.fetch(path, model_name)
        with there.named_in_errors():
            return read(there.weights, there.model, key, there.name)
    path = Path(path).expanduser()
    file = file or path.name
    try:
        contents = reading.read(path)
        found = search.find(contents.entries, model_name, key, file)
        _refuse_other_padding(file, found)
        names = [name for name in found.names.values() if name]
        return _variables(contents.arrays(names), found), found
    except InputError as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise InputError(named, *error.arguments) from error


def _refuse_other_padding(file: str, found: Found) -> None:
    # timm's tf_* models have batch norms with epsilon 1e-3 and TensorFlow's padding.
    # They compute other functions than the models without tf_, under the same names.
    is_tf = file.startswith("tf_")
    if found.scheme == "timm" and is_tf and found.model.startswith("mobilenet"):
        raise InputError(
            "timm's tf_* models have another epsilon and padding; they cannot be read"
            " here"
        )


def note_on(found: Found) -> str:
    """Return what is to be known of how a network was found in a file, or ''."""
    return "; ".join(filter(None, (found.note, search.left_out(found))))


def defect(variables: Mapping[str, Any]) -> str:
    """Return what is wrong with the first invalid variable, or '' if all are valid.

    Otherwise the file is damaged.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(path)
        if found := defect_of(name, leaf, is_variance=path[-1].key == "var"):
            return found
    return ""


def defect_of(name: str, array: np.ndarray, is_variance: bool) -> str:
    """Return what is wrong with a variable, or '' if it is valid.

    Numbers must be finite, and variances must not be negative: their square root in a
    batch norm would be NaN.
    """
    if not np.all(np.isfinite(array)):
        return f"{name} has numbers that are not finite"
    if is_variance and np.any(array < 0):
        return f"{name} has variances below 0"
    return ""


def load(path: str | Path, model_name: str = "") -> dict[str, Any]:
    """Read the variables of P alone, see `read`."""
    return read(path, model_name)[0]


def save(
    path: str | Path,
    variables: Mapping[str, Any],
    metadata: dict[str, str],
    model_name: str = "resnet20",
) -> None:
    """Write variables as a state dict in a safetensors file, see `to_state_dict`."""
    import safetensors.numpy  # here: a game runs without it

    content = safetensors.numpy.save(to_state_dict(variables, model_name), metadata)
    files.write_bytes(Path(path).expanduser(), content)
