"""The pretrained full-precision classifier P, from a safetensors or PyTorch file.

A file holds a state dict: kernels OIHW and dense weights [out, in], with the names of
the pytorchcv model zoo, torchvision, timm, efficientnet_pytorch or He-style scripts.
PyTorch can load the files that this module writes. Names and shapes are checked
strictly against the network, and nothing in a file is ever executed.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from adadfq_jax import models
from adadfq_jax.errors import InputError, short
from adadfq_jax.runtime import files
from adadfq_jax.teacher import naming
from adadfq_jax.teacher.reading import read_state_dict
from adadfq_jax.teacher.recognition import Recognised, recognise, scheme_of

# Shape of an image to trace with; no variable's shape depends on its height and width.
TINY = (32, 32, 1)


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


@functools.lru_cache
def _flat_shapes(
    model_name: str, num_classes: int, image_shape: tuple[int, ...]
) -> dict[Any, Any]:
    model = models.get_model(model_name, num_classes=num_classes)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return flax.traverse_util.flatten_dict(shapes)


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


def identify(names, model_name: str = "") -> Recognised:
    """Return the network and the naming scheme by which to read a state dict.

    Args:
      names: keys of the state dict.
      model_name: the network that it must be, or '' to recognise it.

    Raises:
      InputError: `model_name` is '' and the network is not known.
    """
    if not model_name:
        return recognise(names)
    try:
        scheme = scheme_of(names)
    except InputError:
        scheme = ""
    known = naming.schemes(model_name)
    return Recognised(model_name, scheme if scheme in known else next(iter(known)))


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
    arrays = {k: v for k, v in state_dict.items() if "num_batches_tracked" not in k}
    found = identify(arrays, model_name)
    model_name = found.model
    # Names are checked first, since they depend on no size.
    wanted = naming.keys(model_name, found.scheme, _flat_shapes(model_name, 1, TINY))
    _check_names(arrays, wanted, found)
    flat = _flat_shapes(model_name, *_sizes(arrays, found))
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


def _sizes(
    arrays: Mapping[str, np.ndarray], found: Recognised
) -> tuple[int, tuple[int, int, int]]:
    """Return the number of classes and the image shape, the inputs of `_flat_shapes`.

    They are read from the shapes of the last and the first kernel.
    """
    key = naming.schemes(found.model)[found.scheme]
    head = key(naming.place(("params", "output", "kernel")))
    stem = key(naming.place(("params", "init_block", "conv", "kernel")))
    for name, dimensions in ((head, (2, 4)), (stem, (4,))):
        array = arrays[name]
        if array.ndim not in dimensions or not array.size:
            raise InputError(
                f"{name} is {array.dtype} {array.shape}, which is not the shape of a"
                " kernel"
            )
    return arrays[head].shape[0], (*TINY[:2], arrays[stem].shape[1])


def _check_names(
    arrays: Mapping[str, Any], wanted: Mapping[str, Any], found: Recognised
) -> None:
    missing, extra = sorted(wanted.keys() - arrays), sorted(arrays.keys() - wanted)
    if not missing and not extra:
        return
    hint = ""
    try:
        looks = recognise(arrays)
        if looks.model != found.model:
            hint = (
                f"; its names are those of a {looks.model}"
                f" (teacher.model={looks.model})"
            )
    except InputError:
        pass
    raise InputError(
        f"this is not a {found.model} in {found.scheme} naming: "
        f"{_listing('missing', missing)}; {_listing('extra', extra)}{hint}"
    )


def _listing(what: str, names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {len(names)}: {', '.join(map(short, names[:most])) or 'none'}{more}"


def read(path: str | Path, model_name: str = "") -> tuple[dict[str, Any], Recognised]:
    """Read the variables of P, and tell which network they are of.

    Args:
      path: a safetensors or PyTorch file.
      model_name: a name of `models.names()`, or '' to recognise the network.

    Returns:
      {'params': ..., 'batch_stats': ...} of float32 numpy arrays, and the network.

    Raises:
      InputError: the file is missing, unreadable or of another network.
    """
    path = Path(path)
    try:
        arrays = read_state_dict(path)
        found = identify(arrays, model_name)
        _refuse_other_padding(path, found)
        return from_state_dict(arrays, found.model), found
    except InputError as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise InputError(named) from error


def _refuse_other_padding(path: Path, found: Recognised) -> None:
    # timm's tf_* models have batch norms with epsilon 1e-3 and TensorFlow's padding.
    # They compute other functions than the models without tf_, under the same names.
    if found.scheme != "timm":
        return
    if found.model == "efficientnet_lite0":
        if path.name.startswith("efficientnet_lite0"):
            raise InputError(
                "timm's efficientnet_lite0 has another epsilon and padding than its"
                " tf_efficientnet_lite0; only the latter can be read"
            )
    elif path.name.startswith("tf_"):
        raise InputError(
            "timm's tf_* models have another epsilon and padding; they cannot be read"
            " here"
        )


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
    content = safetensors.numpy.save(to_state_dict(variables, model_name), metadata)
    files.write_bytes(Path(path), content)
