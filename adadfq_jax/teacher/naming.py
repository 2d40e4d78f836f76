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

import flax.linen as nn

from adadfq_jax import models
from adadfq_jax.models import efficientnet_lite
from adadfq_jax.models.efficientnet_lite import EfficientNetLite0
from adadfq_jax.models.mobilenet_v2 import STAGES, MobileNetV2
from adadfq_jax.models.resnet import ResNet
from adadfq_jax.models.resnet_cifar import ResNetCifar
from adadfq_jax.models.tiny import Tiny

Path = tuple[str, ...]  # the path of a variable, which begins with its collection

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
      layer: within a unit, 'conv1' to 'conv3' or 'identity_conv'.
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
        layer, kind = inner
        return Place("stage", int(match[1]), int(match[2]), layer, kind, leaf)
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

_TIMM_EFFICIENTNET_UNITS = {
    (number, unit): (number - 1, unit - 1)
    for number, stage in enumerate(efficientnet_lite.STAGES, 1)
    for unit in range(1, stage.units + 1)
}


def _timm(at: Place, *, units: Mapping[tuple[int, int], tuple[int, int]]) -> str:
    """Name a variable as timm does in networks of inverted residuals.

    The units of the first block have no expansion.

    Args:
      at: the place of the variable.
      units: (stage, unit) -> timm's (block, unit).
    """
    if at.block == "output":
        return f"classifier.{at.leaf}"
    if at.block != "stage":
        conv, bn = {"init_block": ("stem", "1"), "final_block": ("head", "2")}[at.block]
        return f"{f'conv_{conv}' if at.kind == 'conv' else f'bn{bn}'}.{at.leaf}"
    block, index = units[at.stage, at.unit]
    number = int(at.layer.removeprefix("conv"))
    names = ("conv_pw", "conv_dw", "conv_pwl")
    if block == 0:  # a unit without expansion
        number, names = number - 1, ("conv_dw", "conv_pw", "")
    part = names[number - 1] if at.kind == "conv" else f"bn{number}"
    return f"blocks.{block}.{index}.{part}.{at.leaf}"


def _efficientnet_pytorch(at: Place) -> str:
    """Name a variable as the package efficientnet_pytorch and its descendants do."""
    if at.block == "output":
        return f"_fc.{at.leaf}"
    if at.block != "stage":
        conv, bn = {"init_block": ("stem", 0), "final_block": ("head", 1)}[at.block]
        return f"{f'_conv_{conv}' if at.kind == 'conv' else f'_bn{bn}'}.{at.leaf}"
    before = efficientnet_lite.STAGES[: at.stage - 1]
    index = sum(stage.units for stage in before) + at.unit - 1
    number = int(at.layer.removeprefix("conv")) - 1
    conv = ("expand", "depthwise", "project")[number]
    part = f"_{conv}_conv" if at.kind == "conv" else f"_bn{number}"
    return f"_blocks.{index}.{part}.{at.leaf}"


_bind = functools.partial
_TORCHVISION = _bind(_layered, shortcut="downsample", head="fc")
_HE = _bind(_layered, shortcut="shortcut", head="linear")

SCHEMES: dict[type[nn.Module], dict[str, Callable[[Place], str]]] = {
    ResNetCifar: {
        "pytorchcv": _bind(_pytorchcv, body="body."),
        "torchvision": _TORCHVISION,
        "He": _HE,
    },
    ResNet: {
        "pytorchcv": _bind(_pytorchcv, stem="init_block.conv", body="body."),
        "torchvision": _TORCHVISION,
    },
    MobileNetV2: {
        "pytorchcv": _pytorchcv,
        "torchvision": _torchvision_mobilenet,
        "timm": _bind(_timm, units=_TIMM_MOBILENET_UNITS),
    },
    EfficientNetLite0: {
        "EfficientNet-PyTorch": _efficientnet_pytorch,
        "timm": _bind(_timm, units=_TIMM_EFFICIENTNET_UNITS),
    },
    Tiny: {"pytorchcv": _pytorchcv},
}

_WRITTEN_IN = {
    # With pytorchcv's names these two would be recognised as another variant.
    "resnet50b": "torchvision",
    "mobilenet_v2": "torchvision",
    # With timm's names this would be recognised only with a note.
    "efficientnet_lite0": "EfficientNet-PyTorch",
}


def schemes(model_name: str) -> dict[str, Callable[[Place], str]]:
    """Return the naming schemes of a network: name -> function from place to key."""
    found = SCHEMES[type(models.get_model(model_name, num_classes=1))]
    if model_name == "mobilenetv2_small":  # only this project has files of it
        return {"pytorchcv": found["pytorchcv"]}
    return found


def written_in(model_name: str) -> str:
    """Return the scheme in which the network is written to files."""
    return _WRITTEN_IN.get(model_name, "pytorchcv")


def keys(model_name: str, scheme: str, paths: Iterable[Path]) -> dict[str, Path]:
    """Return key -> path for variables of the network in a scheme.

    Args:
      model_name: a name of `models.names()`.
      scheme: one of `schemes(model_name)`.
      paths: paths of the variables in Flax.
    """
    key = schemes(model_name)[scheme]
    return {key(place(path)): path for path in paths}
