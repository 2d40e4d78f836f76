"""State-dict keys of a network's variables, in the naming schemes of known files.

Every scheme is a pure function from the place of a variable to its key. A table lists
the schemes of each family of networks. `keys` inverts a scheme over all variables of a
network, to find the variable of a key.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import flax.traverse_util
import jax
import numpy as np

from adadfq_jax import models
from adadfq_jax.models.efficientnet_lite import EfficientNetLite
from adadfq_jax.models.mobilenet_v2 import STAGES, MobileNetV2
from adadfq_jax.models.resnet import ResNet
from adadfq_jax.models.resnet_cifar import ResNetCifar
from adadfq_jax.models.tiny import Tiny
from adadfq_jax.models.vgg import VGG

Path = tuple[str, ...]  # the path of a variable, which begins with its collection

OUTPUT = "output"  # the module of the last layer
LAST = (OUTPUT, "kernel")
STEM = ("params", "init_block", "conv", "kernel")

# Shape of an image to trace with; no variable's shape depends on its height and width.
TINY = (32, 32, 1)


@functools.lru_cache
def shapes(
    model_name: str, num_classes: int = 1, image_shape: tuple[int, ...] = TINY
) -> dict[Path, jax.ShapeDtypeStruct]:
    """Return the shapes of a network's variables, by path."""
    model = models.get_model(model_name, num_classes=num_classes)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    found = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return flax.traverse_util.flatten_dict(found)


_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


class Place(NamedTuple):
    """The place of a variable in its network.

    Attributes:
      block: name of the top-level module, 'stage' for a unit of a stage.
      stage: number of the stage, from 1; 0 outside the stages.
      unit: number of the unit in its stage, from 1; 0 outside the stages.
      layer: within a unit, 'conv1' to 'conv3' or 'identity_conv'; '' where a unit has
        one convolution.
      kind: 'conv' or 'bn', '' at the output.
      leaf: PyTorch's name of the variable, such as 'weight' or 'running_var'.
    """

    block: str
    stage: int
    unit: int
    layer: str
    kind: str
    leaf: str


def place(path: Path) -> Place:
    """Return the place of a variable from its path in Flax."""
    collection, block, *inner, name = path
    leaf = _LEAVES[collection, name]
    match = re.fullmatch(r"stage(\d+)_unit(\d+)", block)
    if match:
        *layer, kind = inner
        unit = int(match[1]), int(match[2])
        return Place("stage", *unit, layer[0] if layer else "", kind, leaf)
    return Place(block, 0, 0, "", inner[0] if inner else "", leaf)


def _pytorchcv(at: Place, *, stem: str = "init_block", body: str = "") -> str:
    if at.block == "output":
        return f"output.{at.leaf}"
    if at.block == "stage":
        inner = "" if at.layer == "identity_conv" else body
        unit = f"stage{at.stage}.unit{at.unit}"
        return f"features.{unit}.{inner}{at.layer}.{at.kind}.{at.leaf}"
    block = stem if at.block == "init_block" else at.block
    return f"features.{block}.{at.kind}.{at.leaf}"


def _layered(at: Place, *, shortcut: str, head: str) -> str:
    """Name a variable as torchvision's ResNets and many scripts do: layer1.0.conv1."""
    if at.block == "output":
        return f"{head}.{at.leaf}"
    if at.block == "init_block":
        return f"{at.kind}1.{at.leaf}"
    if at.layer == "identity_conv":
        part = f"{shortcut}.{0 if at.kind == 'conv' else 1}"
    else:
        part = at.kind + at.layer.removeprefix("conv")
    return f"layer{at.stage}.{at.unit - 1}.{part}.{at.leaf}"


def _sequential(at: Place) -> str:
    """Name a variable of nn.Sequential(*resnet.children()): 4.0.conv1.weight."""
    if at.block == "output":
        return f"10.{at.leaf}"  # behind the flattening that scripts put before it
    if at.block == "init_block":
        return f"{0 if at.kind == 'conv' else 1}.{at.leaf}"
    _, unit = _TORCHVISION(at).split(".", 1)
    return f"{at.stage + 3}.{unit}"


def _hugging_face(at: Place) -> str:
    """Name a variable as Hugging Face's ResNetForImageClassification does."""
    if at.block == "output":
        return f"classifier.1.{at.leaf}"
    kind = "convolution" if at.kind == "conv" else "normalization"
    if at.block == "init_block":
        return f"resnet.embedder.embedder.{kind}.{at.leaf}"
    layer = "shortcut"
    if at.layer != "identity_conv":
        layer = f"layer.{int(at.layer.removeprefix('conv')) - 1}"
    unit = f"resnet.encoder.stages.{at.stage - 1}.layers.{at.unit - 1}"
    return f"{unit}.{layer}.{kind}.{at.leaf}"


def vgg_position(units: tuple[int, ...], stage: int, unit: int) -> int:
    """Return the place of a convolution among torchvision's VGG `features`.

    A batch norm and a ReLU follow every convolution, and a max-pool ends a stage.
    """
    return 3 * (sum(units[: stage - 1]) + unit - 1) + stage - 1


_VGG_DENSE = {
    "torchvision": ("classifier.0", "classifier.3", "classifier.6"),
    "timm": ("pre_logits.fc1", "pre_logits.fc2", "head.fc"),
    "torchvision, one layer": ("", "", "classifier"),
}


def _vgg(at: Place, *, units: tuple[int, ...], dense: tuple[str, str, str]) -> str:
    """Name a variable of VGG; dense: names of the two hidden layers and the last."""
    if not at.kind:
        names = dict(zip(("hidden1", "hidden2", "output"), dense, strict=True))
        return f"{names[at.block]}.{at.leaf}"
    stage, unit = (at.stage, at.unit) if at.stage else (1, 1)
    position = vgg_position(units, stage, unit) + (at.kind == "bn")
    return f"features.{position}.{at.leaf}"


def _torchvision_mobilenet(at: Place) -> str:
    if at.block == "output":
        return f"classifier.1.{at.leaf}"
    last = 0 if at.kind == "conv" else 1
    if at.block != "stage":
        return f"features.{0 if at.block == 'init_block' else 18}.{last}.{at.leaf}"
    index = sum(len(widths) for widths in STAGES[: at.stage - 1]) + at.unit
    # The first unit has no conv1, so that its positions begin with conv2.
    position = int(at.layer.removeprefix("conv")) - (2 if index == 1 else 1)
    if at.layer == "conv3":
        return f"features.{index}.conv.{position + last}.{at.leaf}"
    return f"features.{index}.conv.{position}.{last}.{at.leaf}"


# (stage, unit) -> (block, unit) in timm, which begins a new block of MobileNetV2
# wherever the width changes.
_TIMM_MOBILENET_UNITS = {
    (stage, unit): (block, index)
    for block, (_, group) in enumerate(
        itertools.groupby(
            [
                (width, s, u)
                for s, row in enumerate(STAGES, 1)
                for u, width in enumerate(row, 1)
            ],
            key=lambda entry: entry[0],
        )
    )
    for index, (_, stage, unit) in enumerate(group)
}


def _timm(
    at: Place, *, units: Mapping[tuple[int, int], tuple[int, int]] | None = None
) -> str:
    """Name a variable as timm does in networks of inverted residuals.

    The units of the first block have no expansion.

    Args:
      at: the place of the variable.
      units: (stage, unit) -> timm's (block, unit); None: the same, from 0.
    """
    if at.block == "output":
        return f"classifier.{at.leaf}"
    if at.block != "stage":
        conv, bn = {"init_block": ("stem", "1"), "final_block": ("head", "2")}[at.block]
        return f"{f'conv_{conv}' if at.kind == 'conv' else f'bn{bn}'}.{at.leaf}"
    block, index = at.stage - 1, at.unit - 1
    if units is not None:
        block, index = units[at.stage, at.unit]
    number = int(at.layer.removeprefix("conv"))
    names = ("conv_pw", "conv_dw", "conv_pwl")
    if block == 0:  # a unit without expansion
        number, names = number - 1, ("conv_dw", "conv_pw", "")
    part = names[number - 1] if at.kind == "conv" else f"bn{number}"
    return f"blocks.{block}.{index}.{part}.{at.leaf}"


def _efficientnet_pytorch(at: Place, *, units: tuple[int, ...]) -> str:
    """Name a variable as the package efficientnet_pytorch and its descendants do."""
    if at.block == "output":
        return f"_fc.{at.leaf}"
    if at.block != "stage":
        conv, bn = {"init_block": ("stem", 0), "final_block": ("head", 1)}[at.block]
        return f"{f'_conv_{conv}' if at.kind == 'conv' else f'_bn{bn}'}.{at.leaf}"
    index = sum(units[: at.stage - 1]) + at.unit - 1
    number = int(at.layer.removeprefix("conv")) - 1
    conv = ("expand", "depthwise", "project")[number]
    part = f"_{conv}_conv" if at.kind == "conv" else f"_bn{number}"
    return f"_blocks.{index}.{part}.{at.leaf}"


_bind = functools.partial
_TORCHVISION = _bind(_layered, shortcut="downsample", head="fc")
_HE = _bind(_layered, shortcut="shortcut", head="linear")

_RESNET: dict[str, Callable[[Place], str]] = {
    "pytorchcv": _bind(_pytorchcv, stem="init_block.conv", body="body."),
    "torchvision": _TORCHVISION,
    "He": _HE,
    "Hugging Face": _hugging_face,
}


def schemes(model_name: str) -> dict[str, Callable[[Place], str]]:
    """Return the naming schemes of a network: name -> function from place to key."""
    module = models.get_model(model_name, num_classes=1)
    match module:
        case ResNetCifar():
            return {
                "pytorchcv": _bind(_pytorchcv, body="body."),
                "torchvision": _TORCHVISION,
                "He": _HE,
            }
        case ResNet(small_images=True):
            return {name: _RESNET[name] for name in _RESNET if name != "pytorchcv"}
        case ResNet():
            return {**_RESNET, "nn.Sequential": _sequential}
        case VGG():
            names = list(_VGG_DENSE)[:2] if module.hidden else list(_VGG_DENSE)[2:]
            return {
                name.split(",")[0]: _bind(
                    _vgg, units=module.units, dense=_VGG_DENSE[name]
                )
                for name in names
            }
        case MobileNetV2() if model_name == "mobilenetv2_small":
            return {"pytorchcv": _pytorchcv}  # only this project has files of it
        case MobileNetV2():
            return {
                "pytorchcv": _pytorchcv,
                "torchvision": _torchvision_mobilenet,
                "timm": _bind(_timm, units=_TIMM_MOBILENET_UNITS),
            }
        case EfficientNetLite():
            units = tuple(stage.units for stage in module.stages)
            timm: dict[str, Callable[[Place], str]] = {"timm": _timm}
            if module.symmetric:
                return timm
            return {
                "EfficientNet-PyTorch": _bind(_efficientnet_pytorch, units=units),
                **timm,
            }
        case Tiny():
            return {"pytorchcv": _pytorchcv}
        case _:
            raise NotImplementedError(model_name)


def written_in(model_name: str) -> str:
    """Return the scheme in which the network is written to files.

    It is pytorchcv's, unless the network has no names there, or another variant has the
    same.
    """
    known = list(schemes(model_name))
    if model_name in ("resnet50b", "mobilenet_v2"):
        return "torchvision"
    return known[0]


def keys(model_name: str, scheme: str, paths: Iterable[Path]) -> dict[str, Path]:
    """Return key -> path for variables of the network in a scheme.

    Args:
      model_name: a name of `models.names()`.
      scheme: one of `schemes(model_name)`.
      paths: paths of the variables in Flax.
    """
    key = schemes(model_name)[scheme]
    return {key(place(path)): path for path in paths}
