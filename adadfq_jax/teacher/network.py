"""P as a function: the network of a file, whatever the kind of the file."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adadfq_jax import models
from adadfq_jax.errors import InputError
from adadfq_jax.network import (
    Function,
    as_function,
    named,
    onnx_network,
    trace,
    tree_of,
)
from adadfq_jax.teacher import hub, loading, onnx_file, reading

# What keeps the batch norms in an ONNX file that PyTorch writes.
EXPORTS = (
    'torch.onnx.export(model, (x,), "net.onnx", dynamo=True, optimize=False,'
    " external_data=False)",
    'torch.onnx.export(model, (x,), "net.onnx", dynamo=False,'
    " training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)",
)


@functools.cache
def package_function(
    model: str, num_classes: int, image_shape: tuple[int, ...]
) -> Function:
    """Return a network of the package, with the shapes of its variables.

    Raises:
      InputError: there is no such network.
    """
    module = models.get_model(model, num_classes=num_classes)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    return as_function(module, shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedNetwork:
    """P, a function of images, as its file describes it.

    Attributes:
      name: name of the network; that of the file where it is not of this package.
      function: the network with its variables by name.
      image_shape: (H, W, channels). A state dict does not tell H and W: they are those
        of its repository, or those that the network is used with most.
      num_classes: length of the logits.
      kind: what the file is, in words.
      naming: the naming scheme of a state dict, '' for other files.
      notes: what the user should know.
      mean: of the normalisation per channel, where a repository tells it, else ().
      std: see `mean`.
      address: of the repository, with the commit; '' for a file.
      tells_size: whether the file or its repository tells H and W.
    """

    name: str
    function: Function
    image_shape: tuple[int, ...]
    num_classes: int
    kind: str
    naming: str = ""
    notes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    address: str = ""
    tells_size: bool = True

    @functools.cached_property
    def variables(self) -> Any:
        """The variables as `apply` takes them: a tree of numpy arrays."""
        return tree_of(self.function.variables, self.function.paths or {})

    def apply(self, variables: Any, images: Any) -> Any:
        """Compute the logits [B, classes] of normalised images [B, H, W, channels]."""
        return self.function.apply(named(variables), images)

    def defect(self) -> str:
        """Return what is wrong with the first invalid variable, or ''."""
        if self.function.definition is None:
            return loading.defect(self.variables)
        graph = onnx_network.from_json(self.function.definition)
        variances = graph.statistics.values()
        for name, array in self.function.variables.items():
            if wrong := loading.defect_of(name, array, name in variances):
                return wrong
        return ""


def load_network(
    path: str | Path,
    name: str = "",
    batch_norms: bool = True,
    *,
    key: str = "",
    image_shape: Sequence[int] | None = None,
) -> LoadedNetwork:
    """Read P from a file of any kind, as a function of images.

    `quantize(load_network(path))` quantizes it. Nothing in the file is executed.

    Args:
      path: a PyTorch or safetensors file that holds the state dict of a known network,
        under whatever keys and prefixes, or an ONNX file; or 'hf://OWNER/NAME' or
        'hf://OWNER/NAME@REVISION', a repository of the Hugging Face Hub.
      name: a name of `models.names()`, or '' to recognise the network; for an ONNX
        file any name, and '' is that of the file.
      batch_norms: whether an ONNX file without batch norms is refused. Exporters fold
        them into convolutions by default, and G learns most from them.
      key: keys around the weights, such as 'state_dict_ema', where a checkpoint has
        several sets; '' means those that are no average of others.
      image_shape: (H, W, channels), where the file does not tell them.

    Returns:
      The network, with `apply(variables, images)`, `variables`, `image_shape`,
      `num_classes`, `name` and `notes`. The images are normalised, [B, H, W, channels],
      by `mean` and `std` where a repository tells them.

    Raises:
      adadfq_jax.errors.InputError: the file cannot be read, or its network is not
        known.
    """
    shape = None if image_shape is None else tuple(image_shape)
    if hub.is_hub(path):
        return _of_hub(path, name, key, shape)
    path = Path(path).expanduser()
    reading.require_file(path)
    if onnx_file.is_onnx(path):
        if other := reading.other_kind(path):
            raise InputError(f"{path}: not an ONNX file, but {other}")
        try:
            return _of_onnx(path, name or path.stem, batch_norms, shape)
        except InputError as error:
            raise InputError(f"{path}: {error}", *error.arguments) from error
    return _of_state_dict(path, name, key, shape)


def _of_hub(
    path: str | Path, name: str, key: str, image_shape: tuple[int, ...] | None
) -> LoadedNetwork:
    there = hub.fetch(path, name)
    with there.named_in_errors():
        found = _of_state_dict(
            there.weights, there.model, key, image_shape, there.name, there.image_size
        )
    if there.num_classes not in (0, found.num_classes):
        raise InputError(
            f"{there.address}: its {hub.CONFIG} says {there.num_classes} classes, and"
            f" its weights are of {found.num_classes}"
        )
    channels = found.image_shape[2]
    if len(there.mean) not in (0, channels):
        raise InputError(
            f"{there.address}: its mean={there.mean} and std={there.std} must have"
            f" {channels} values each, one per channel of the weights"
        )
    return dataclasses.replace(
        found,
        mean=there.mean,
        std=there.std,
        address=there.address,
        tells_size=bool(there.image_size),
        notes=(*filter(None, [there.note]), *found.notes),
    )


def _of_state_dict(
    path: Path,
    name: str,
    key: str,
    shape: tuple[int, ...] | None,
    file: str = "",
    size: tuple[int, ...] = (),
) -> LoadedNetwork:
    variables, found = loading.read(path, name, key, file)
    arrays = named(variables)
    classes = arrays["output.kernel"].shape[-1]
    channels = arrays["init_block.conv.kernel"].shape[2]
    if shape is None:
        usual = models.usual_image_shape(found.model, channels)
        shape = (*(size or usual[:2]), channels)
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            f"image_shape={shape}: must be (H, W, channels)", "image_shape"
        )
    # A state dict does not tell the sizes of images, and so not all shapes.
    function = package_function(found.model, classes, shape)
    for name, leaf in function.variables.items():
        if arrays[name].shape != leaf.shape:
            raise InputError(
                f"{path}: {name} is {arrays[name].shape}, but image_shape={shape}"
                f" needs {leaf.shape}",
                "image_shape",
            )
    return LoadedNetwork(
        found.model,
        function._replace(variables=arrays),
        shape,
        classes,
        reading.file_kind(path),
        found.scheme,
        tuple(filter(None, [loading.note_on(found)])),
        tells_size=False,
    )


def _of_onnx(
    path: Path, name: str, batch_norms: bool, image_shape: tuple[int, ...] | None
) -> LoadedNetwork:
    content = onnx_file.read(path, image_shape)
    function = content.graph.function(content.variables)
    if batch_norms:
        shapes = function.of_shapes().variables
        graph = trace(function.apply, shapes, image_shape=content.image_shape)
        operators = {node.operator for node in content.graph.nodes}
        if not graph.batch_norms and "LayerNormalization" in operators:
            raise InputError(
                "its norms are layer norms; it has no batch norm, whose statistics G"
                " learns most from; batch_norms=False reads it all the same",
                "batch_norms",
            )
        if not graph.batch_norms:
            raise InputError(
                "it has no batch norm: exporters fold them into the convolutions, and"
                f" G learns most from them. Export it again with {EXPORTS[0]} or with"
                f" {EXPORTS[1]}; batch_norms=False reads it as it is",
                "batch_norms",
            )
    return LoadedNetwork(
        name,
        function,
        content.image_shape,
        content.num_classes,
        f"ONNX, opset {content.opset}",
        notes=content.notes,
    )
