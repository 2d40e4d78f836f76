"""Recognising the network of a state dict from its names."""

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from adadfq_jax import models
from adadfq_jax.errors import InputError, short


class Recognised(NamedTuple):
    """The network that the names of a state dict belong to.

    Attributes:
      model: a name of `models.names()`.
      scheme: a name of `naming.schemes`.
      note: what the names leave uncertain, or ''.
    """

    model: str
    scheme: str
    note: str = ""


# Patterns of each scheme: a key that shows the scheme, and the (stage, unit) of a key.
_SIGNS = {
    "pytorchcv": (r"features\.init_block\.", r"features\.stage(\d+)\.unit(\d+)\."),
    "timm": (r"conv_stem\.weight$", r"blocks\.(\d+)\.(\d+)\."),
    "torchvision MobileNet": (r"features\.0\.0\.weight$", r"(features)\.(\d+)\.conv\."),
    "torchvision": (r"fc\.weight$", r"layer(\d+)\.(\d+)\."),
    "He": (r"linear\.weight$", r"layer(\d+)\.(\d+)\."),
    "EfficientNet-PyTorch": (r"_conv_stem\.weight$", r"(_blocks)\.(\d+)\."),
}

_RESNETS: dict[
    tuple[tuple[int, ...], bool], str
] = {  # by the numbers of units in the stages, and whether they are bottlenecks
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
}
_CIFAR = {(n, n, n): f"resnet{depth}" for depth, n in models.CIFAR_UNITS.items()}
_MOBILENETS = {
    "pytorchcv": (1, 2, 3, 7, 4),
    "timm": (1, 2, 3, 4, 3, 3, 1),
    "torchvision MobileNet": (17,),
}

_SMALL_MOBILENET = (1, 2, 3, 2)
_EFFICIENTNETS = {"timm": (1, 2, 2, 3, 3, 4, 1), "EfficientNet-PyTorch": (16,)}

_STRIDE_NOTE = (
    "resnet50 and resnet50b have the same shapes: the names decide where the stride"
    " is, {where}; teacher.model={other} overrides this"
)
_TENSORFLOW_NOTE = (
    "timm's efficientnet_lite0 and tf_efficientnet_lite0 have the same names and"
    " shapes: this is read as the second, which pads and normalises as TensorFlow does"
)


def _sign(names: Collection[str]) -> str:
    for sign, (known_by, units) in _SIGNS.items():
        if any(re.match(known_by, name) for name in names) and any(
            re.match(units, name) for name in names
        ):
            return sign
    some = ", ".join(map(short, sorted(names)[:3]))
    raise InputError(
        f"unknown naming: keys as {some} belong to no known network in the names of"
        " pytorchcv, torchvision, timm, EfficientNet-PyTorch or He-style scripts"
    )


def scheme_of(names: Collection[str]) -> str:
    """Return the naming scheme of a state dict, whatever its network.

    Raises:
      InputError: the names are of no known scheme.
    """
    return _sign(names).removesuffix(" MobileNet")


def _units(names: Collection[str], pattern: str) -> tuple[int, ...]:
    """Return the number of units in each stage, in order."""
    found = {match.groups() for name in names if (match := re.match(pattern, name))}
    counts = Counter(stage for stage, _ in found)
    return tuple(counts[stage] for stage in sorted(counts, key=lambda s: (len(s), s)))


def _has(names: Collection[str], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in names)


def recognise(names: Collection[str]) -> Recognised:
    """Recognise the network and naming scheme of a state dict from its keys alone.

    Keys do not determine everything: the epsilon of the batch norms, the padding and
    the activation are assumed to be those of the network with these names.

    Raises:
      InputError: the names are of no known scheme, or of another network.
    """
    sign = _sign(names)
    scheme = sign.removesuffix(" MobileNet")
    units = _units(names, _SIGNS[sign][1])
    bodies = _has(names, r"\.body\.")
    if (sign, units) == ("pytorchcv", _SMALL_MOBILENET) and not bodies:
        return Recognised("mobilenetv2_small", scheme)
    if _MOBILENETS.get(sign) == units and not bodies:
        expands = _has(names, r"^features\.stage1\.unit1\.conv1\.")
        return Recognised("mobilenetv2_w1" if expands else "mobilenet_v2", scheme)
    squeezes = _has(names, r"\.(se|_se_reduce)\.")  # EfficientNet-B0
    if _EFFICIENTNETS.get(sign) == units and not squeezes:
        note = _TENSORFLOW_NOTE if scheme == "timm" else ""
        return Recognised("efficientnet_lite0", scheme, note)
    bottlenecks = _has(names, r"\.conv3\.")
    if units in _CIFAR and not bottlenecks:
        shortcuts = _has(names, r"\.(identity_conv|downsample|shortcut)\.")
        return Recognised(_CIFAR[units] + ("" if shortcuts else "a"), scheme)
    model = _RESNETS.get((units, bottlenecks))
    if model is None or scheme == "He":
        stages = short(str(units))
        raise InputError(
            f"unknown network: {scheme} naming, stages of {stages} units; the known"
            f" networks are {', '.join(models.names())}"
        )
    if model != "resnet50":
        return Recognised(model, scheme)
    if scheme == "pytorchcv":
        where, other = "in the first 1x1 convolution (resnet50)", "resnet50b"
    else:
        model, other = "resnet50b", "resnet50"
        where = "in the 3x3 convolution (resnet50b)"
    return Recognised(model, scheme, _STRIDE_NOTE.format(where=where, other=other))
