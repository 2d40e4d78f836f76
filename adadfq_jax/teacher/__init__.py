"""The pretrained full-precision classifier P, from a safetensors or PyTorch file.

Files hold a state dict with the names of the pytorchcv model zoo (kernels OIHW, dense
weights [out, in]); those written here open in PyTorch as well. Names and shapes are
checked strictly against the network, and nothing in a file is ever executed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from adadfq_jax import files, models, torch_file
from adadfq_jax.errors import InputError

_LEAF_TO_TORCH = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def torch_name(path: tuple[str, ...]) -> str:
    """Pytorchcv's state-dict key of a variable.

    ('params', 'stage1_unit1', 'conv1', 'bn', 'scale') is
    'features.stage1.unit1.body.conv1.bn.weight'.
    """
    collection, *modules, leaf = path
    leaf = _LEAF_TO_TORCH[collection, leaf]
    if modules[0] == "output":
        return f"output.{leaf}"
    names = ["features", re.sub(r"^(stage\d+)_(unit\d+)$", r"\1.\2", modules[0])]
    if len(modules) > 2 and modules[1] != "identity_conv":
        names.append("body")
    return ".".join([*names, *modules[1:], leaf])


def _to_flax(array: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO and [out, in] -> [in, out]; vectors stay."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T


def _to_torch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T


def variable_shapes(model_name: str, num_classes: int, image_shape) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct` that the network's variables have."""
    model = models.get_model(model_name, num_classes=num_classes)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def to_state_dict(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables {'params', 'batch_stats'} -> state dict in pytorchcv's names."""
    flat = flax.traverse_util.flatten_dict(dict(variables))
    return {
        torch_name(path): np.ascontiguousarray(_to_torch(np.asarray(leaf)))
        for path, leaf in flat.items()
    }


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], model_name: str
) -> dict[str, Any]:
    """State dict in pytorchcv's names -> variables {'params', 'batch_stats'}.

    The number of classes and of image channels is read off the file.

    Args:
      state_dict: arrays by name; `num_batches_tracked` entries are ignored.
      model_name: a name of `models.names()`.

    Returns:
      float32 numpy arrays in the structure of the network's variables.

    Raises:
      InputError: names are missing or left over, or a shape or type is wrong.
    """
    arrays = {k: v for k, v in state_dict.items() if "num_batches_tracked" not in k}
    flat = _flat_shapes(model_name, 10, 3)
    wanted = {torch_name(path): path for path in flat}
    missing, extra = sorted(wanted.keys() - arrays), sorted(arrays.keys() - wanted)
    if missing or extra:
        raise InputError(
            f"this is not a {model_name} in pytorchcv naming: "
            f"{_listing('missing', missing)}; {_listing('extra', extra)}"
        )
    head, stem = arrays["output.bias"], arrays["features.init_block.conv.weight"]
    if head.ndim != 1 or stem.ndim != 4:
        raise InputError("output.bias or features.init_block.conv.weight is misshapen")
    flat = _flat_shapes(model_name, head.shape[0], stem.shape[1])
    leaves = {}
    for name, path in wanted.items():
        array = _to_flax(arrays[name])
        if array.dtype.kind != "f" or array.shape != flat[path].shape:
            raise InputError(
                f"{name} is {arrays[name].dtype} {arrays[name].shape}, which does not"
                f" fit {model_name} ({flat[path].shape} in Flax layout, float)"
            )
        leaves[path] = np.ascontiguousarray(array, np.float32)
    return flax.traverse_util.unflatten_dict(leaves)


def _flat_shapes(model_name: str, num_classes: int, channels: int) -> dict[Any, Any]:
    shapes = variable_shapes(model_name, num_classes, (32, 32, channels))
    return flax.traverse_util.flatten_dict(shapes)


def _listing(what: str, names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {len(names)}: {', '.join(names[:most]) or 'none'}{more}"


def load(path: str | Path, model_name: str) -> dict[str, Any]:
    """Variables of P from a safetensors or PyTorch file.

    Args:
      path: the file.
      model_name: a name of `models.names()`.

    Returns:
      {'params': ..., 'batch_stats': ...} of float32 numpy arrays.

    Raises:
      InputError: the file is missing, unreadable or of another network.
    """
    path = Path(path)
    try:
        return from_state_dict(read_state_dict(path), model_name)
    except InputError as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise InputError(named) from error


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name, of a safetensors or a PyTorch file; by content, not by name.

    Raises:
      InputError: there is no such file, or it is neither of the two, or damaged.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; config.teacher.path must name P's file"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] != b"{":  # a safetensors file is a length and a JSON object
        return torch_file.read(path)
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, OSError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({error})"
        ) from error


def save(
    path: str | Path, variables: Mapping[str, Any], metadata: dict[str, str]
) -> None:
    """Writes variables as a safetensors state dict in pytorchcv's names."""
    content = safetensors.numpy.save(to_state_dict(variables), metadata)
    files.write_bytes(Path(path), content)
