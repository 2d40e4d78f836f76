"""The pretrained full-precision classifier P, from a safetensors or PyTorch file.

Files hold a state dict (kernels OIHW, dense weights [out, in]) in the names of the
pytorchcv model zoo, of torchvision, of timm, of efficientnet_pytorch or of He-style
scripts; those written here open in PyTorch as well. Names and shapes are checked
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

TINY = (32, 32, 1)  # an image; its height and width are in no variable's shape


def torch_name(path: tuple[str, ...], model_name: str = "resnet20") -> str:
    """The state-dict key under which a variable is written.

    ('params', 'stage1_unit1', 'conv1', 'bn', 'scale') of a ResNet is
    'features.stage1.unit1.body.conv1.bn.weight'.
    """
    scheme = naming.written_in(model_name)
    return naming.schemes(model_name)[scheme](naming.place(path))


def _to_flax(array: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO and [out, in] -> [in, out]; vectors stay."""
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
    variables: Mapping[str, Any], model_name: str = "resnet20"
) -> dict[str, np.ndarray]:
    """Variables {'params', 'batch_stats'} -> state dict, in the names of `torch_name`.

    A CIFAR network's names are the same for all of them.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables))
    return {
        torch_name(path, model_name): np.ascontiguousarray(_to_torch(np.asarray(leaf)))
        for path, leaf in flat.items()
    }


def identify(names, model_name: str = "") -> Recognised:
    """The network and scheme to read names as.

    Args:
      names: keys of a state dict.
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
    """State dict -> variables {'params', 'batch_stats'}.

    The number of classes and of image channels is read off the file.

    Args:
      state_dict: arrays by name; `num_batches_tracked` entries are ignored.
      model_name: a name of `models.names()`, or '' for what the names say.

    Returns:
      float32 numpy arrays in the structure of the network's variables.

    Raises:
      InputError: names are missing or left over, or a shape or type is wrong.
    """
    arrays = {k: v for k, v in state_dict.items() if "num_batches_tracked" not in k}
    found = identify(arrays, model_name)
    model_name = found.model
    # Names first: they depend on no size.
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
    """Classes and image shape that the arrays are of, for `_flat_shapes`."""
    key = naming.schemes(found.model)[found.scheme]
    head = key(naming.place(("params", "output", "kernel")))
    stem = key(naming.place(("params", "init_block", "conv", "kernel")))
    for name, dimensions in ((head, (2, 4)), (stem, (4,))):
        array = arrays[name]
        if array.ndim not in dimensions or not array.size:
            raise InputError(f"{name} is {array.dtype} {array.shape}, no such kernel")
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
    """Variables of P, and what they were read as.

    Args:
      path: a safetensors or PyTorch file.
      model_name: a name of `models.names()`, or '' to recognise it.

    Returns:
      {'params': ..., 'batch_stats': ...} of float32 numpy arrays; the network.

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
    # The batch norms of timm's tf_* models have epsilon 1e-3 and they pad as TensorFlow
    # does: other functions than those without tf_, in the same names.
    if found.scheme != "timm":
        return
    if found.model == "efficientnet_lite0":
        if path.name.startswith("efficientnet_lite0"):
            raise InputError(
                "timm's efficientnet_lite0 has another epsilon and padding than its"
                " tf_efficientnet_lite0, which alone is known here"
            )
    elif path.name.startswith("tf_"):
        raise InputError(
            "timm's tf_* models have another epsilon and padding, which are not known"
            " here"
        )


def defect(variables: Mapping[str, Any]) -> str:
    """The first variable that no trained network has and what is wrong with it, or ''.

    A variance below 0 would be NaN at the first batch norm: its file is damaged.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(path)
        if not np.all(np.isfinite(leaf)):
            return f"{name} has numbers that are not finite"
        if path[-1].key == "var" and np.any(leaf < 0):
            return f"{name} has variances below 0"
    return ""


def load(path: str | Path, model_name: str = "") -> dict[str, Any]:
    """The variables of `read`."""
    return read(path, model_name)[0]


def save(
    path: str | Path,
    variables: Mapping[str, Any],
    metadata: dict[str, str],
    model_name: str = "resnet20",
) -> None:
    """Writes variables as a safetensors state dict, see `to_state_dict`."""
    content = safetensors.numpy.save(to_state_dict(variables, model_name), metadata)
    files.write_bytes(Path(path), content)
