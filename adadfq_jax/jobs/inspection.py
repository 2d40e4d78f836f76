"""The job --mode=inspect: say what a file is, and how to quantize it."""

import math
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util

from adadfq_jax import teacher
from adadfq_jax.deploy import quantized_file
from adadfq_jax.runtime import invocation


class _Recipe(NamedTuple):
    """A packaged configuration, and what it says of P.

    Attributes:
      name: name of the configuration.
      model: name of P's network, '' if any network is accepted.
      classes: number of classes.
      image_size: height and width of the images.
    """

    name: str
    model: str
    classes: int
    image_size: int


_CIFAR10 = _Recipe("cifar10_resnet20", "resnet20", 10, 32)
_CIFAR100 = _Recipe("cifar100_resnet20", "resnet20", 100, 32)
_RESNET18 = _Recipe("imagenet_resnet18", "resnet18", 1000, 224)
_RESNET50 = _Recipe("imagenet_resnet50", "", 1000, 224)
_MOBILENET = _Recipe("imagenet_mobilenet_v2", "", 1000, 224)
_EFFICIENTNET = _Recipe("imagenet_efficientnet_lite0", "", 1000, 224)
_IMAGENET = {
    "resnet18": _RESNET18,
    "resnet34": _RESNET18,
    "resnet50": _RESNET50,
    "resnet50b": _RESNET50,
    "mobilenetv2_w1": _MOBILENET,
    "mobilenet_v2": _MOBILENET,
    "efficientnet_lite0": _EFFICIENTNET,
}


def describe(path: Path, model_name: str = "") -> str:
    """Describe P's file or a `quantized.safetensors` in some lines.

    They name the kind of file, the network and naming scheme, the numbers of
    parameters, classes and input channels, and the command that quantizes the file.

    Args:
      path: the file.
      model_name: the network to read it as, or '' to recognise it.

    Raises:
      InputError: the file cannot be read, or holds no known network.
    """
    if quantized_file.is_quantized(path):
        return _describe_quantized(path)
    variables, found = teacher.read(path, model_name)
    params = flax.traverse_util.flatten_dict(variables["params"], sep=".")
    classes = params["output.kernel"].shape[-1]
    channels = params["init_block.conv.kernel"].shape[2]
    lines = [
        f"{path}: {teacher.file_kind(path)}, {path.stat().st_size:,} bytes",
        f"network     {found.model} in {found.scheme} naming",
        f"parameters  {sum(math.prod(p.shape) for p in params.values()):,}",
        f"classes     {classes}",
        f"channels    {channels}",
    ]
    if found.note:
        lines.insert(2, f"note        {found.note}")
    wrong = teacher.defect(variables)
    if wrong:
        return "\n".join([*lines, f"quantize    no: {wrong}"])
    overridden = found.model if model_name else ""
    command = _command(path, found.model, classes, channels, overridden)
    return "\n".join([*lines, "quantize    yes:", *command])


def _describe_quantized(path: Path) -> str:
    network = quantized_file.load_quantized(path)
    info, shapes = network.info, network.function.variables
    parameters = sum(math.prod(shapes[name].shape) for name in network.graph.parameters)
    command = invocation.command("evaluate", "--config=NAME", f"--file={path}")
    own = network.info.bits_in_words(network.graph)
    return "\n".join(
        [
            f"{path}: a quantized network of this package",
            f"network     {info.model}, {info.bits}",
            *([f"layers      {own}; all others as named above"] if own else []),
            f"parameters  {parameters:,}",
            f"classes     {info.num_classes}",
            f"channels    {info.image_shape[-1]}",
            "quantize    no, it is quantized already; measure it with",
            f"    {' '.join(command)}",
            "where NAME stands for the configuration of its run, which names the"
            " evaluation set.",
        ]
    )


def _command(
    path: Path, model: str, classes: int, channels: int, overridden: str
) -> list[str]:
    """Return the command that quantizes the file, and what to check before it runs."""
    cifar = _CIFAR100 if classes == 100 else _CIFAR10
    recipe = _IMAGENET.get(model, cifar)
    flags = [f"--config={recipe.name}:w4a4", f"--workdir=runs/{path.stem}-w4a4"]
    flags.append(f"--config.teacher.path={path}")
    if overridden or (recipe.model and recipe.model != model):
        flags.append(f"--config.teacher.model={model}")
    if recipe.classes != classes:
        flags.append(f"--config.teacher.num_classes={classes}")
    if channels != 3:
        shape = (recipe.image_size, recipe.image_size, channels)
        flags.append(f"--config.teacher.image_shape={shape}")
        for key, value in (("mean", 0.5), ("std", 0.25)):
            flags.append(f"--config.teacher.{key}={(value,) * channels}")
    if recipe is cifar and (recipe.classes != classes or channels != 3):
        flags.append("--config.eval.enabled=False")
    lines = invocation.command("train", *flags)
    return [
        " \\\n        ".join(["    " + lines[0], *lines[1:]]),
        "The file does not tell the size, mean and std of P's images. Check those of"
        " the configuration: config.teacher.image_shape, mean and std.",
    ]
