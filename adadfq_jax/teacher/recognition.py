"""Recognising the network of a body from the names and shapes of its tensors."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from adadfq_jax import models
from adadfq_jax.errors import InputError, short
from adadfq_jax.teacher import naming


class Sign(NamedTuple):
    """How the names of a naming scheme are known, below their common beginning.

    Attributes:
      scheme: a name of `naming.schemes`.
      stems: keys of the first convolution's kernel.
      units: pattern of the (stage, unit) in a key.
    """

    scheme: str
    stems: tuple[str, ...]
    units: str


SIGNS = (
    Sign(
        "pytorchcv",
        ("init_block.conv.weight", "init_block.conv.conv.weight"),
        r"stage(\d+)\.unit(\d+)\.",
    ),
    Sign("timm", ("conv_stem.weight",), r"blocks\.(\d+)\.(\d+)\."),
    Sign("torchvision MobileNet", ("0.0.weight",), r"()(\d+)\.conv\."),
    Sign("torchvision", ("conv1.weight",), r"layer(\d+)\.(\d+)\."),
    Sign("nn.Sequential", ("0.weight",), r"([4-7])\.(\d+)\."),
    Sign("torchvision VGG", ("0.weight",), r"()(\d+)\.running_mean$"),
    Sign(
        "Hugging Face",
        ("embedder.embedder.convolution.weight",),
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.",
    ),
    Sign("EfficientNet-PyTorch", ("_conv_stem.weight",), r"(_blocks)\.(\d+)\."),
)


class Recognised(NamedTuple):
    """The network that a body belongs to.

    Attributes:
      model: a name of `models.names()`.
      scheme: a name of `naming.schemes`.
      note: what the names leave uncertain, or ''.
    """

    model: str
    scheme: str
    note: str = ""


# By the numbers of units in the stages, and whether they are bottlenecks.
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
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
_LITES = {  # by the number of units and the channels of the last one
    (16, 320): "efficientnet_lite0",
    (21, 320): "efficientnet_lite1",
    (21, 352): "efficientnet_lite2",
}
_VGGS = {  # by the places of the batch norms
    tuple(
        naming.vgg_position(units, stage, unit) + 1
        for stage, count in enumerate(units, 1)
        for unit in range(1, count + 1)
    ): f"vgg{depth}_bn"
    for depth, units in models.VGG_UNITS.items()
}

_STRIDE_NOTE = (
    "resnet50 and resnet50b have the same shapes: the names decide where the stride"
    " is, {where}; teacher.model={other} overrides this"
)
_STEM_NOTE = "its first convolution is 3x3: stride 1 and no max-pool are assumed"


def _units(names: Mapping[str, Any], pattern: str) -> tuple[int, ...]:
    """Return the number of units in each stage, in order."""
    found = {match.groups() for name in names if (match := re.match(pattern, name))}
    counts = Counter(stage for stage, _ in found)
    return tuple(counts[stage] for stage in sorted(counts, key=lambda s: (len(s), s)))


def _has(names: Mapping[str, Any], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in names)


def _shape(body: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Return the shape of an entry, () where there is none, as in a list of names."""
    return tuple(getattr(body.get(name), "shape", ()))


def recognise(sign: Sign, body: Mapping[str, Any], file: str = "") -> list[Recognised]:
    """Recognise the networks that names below their common beginning may be of.

    Names and shapes do not determine everything: the epsilon of the batch norms, the
    padding and the activation are assumed to be those of the network with these names.

    Args:
      sign: the naming scheme.
      body: entries with a `shape`, by name.
      file: name of the file, which tells two forms of EfficientNet-Lite apart.

    Returns:
      The networks; none where the names are not of the scheme.

    Raises:
      InputError: it is no known network, or it could be either of two.
    """
    scheme = sign.scheme.removesuffix(" MobileNet").removesuffix(" VGG")
    units = _units(body, sign.units)
    if not units:
        return []
    bodies = _has(body, r"\.body\.")
    if (scheme, units) == ("pytorchcv", _SMALL_MOBILENET) and not bodies:
        return [Recognised("mobilenetv2_small", scheme)]
    if _MOBILENETS.get(sign.scheme) == units and not bodies:
        expands = _has(body, r"^stage1\.unit1\.conv1\.")
        return [Recognised("mobilenetv2_w1" if expands else "mobilenet_v2", scheme)]
    if sign.scheme == "torchvision VGG":
        places = sorted(int(n.split(".")[0]) for n in body if re.match(sign.units, n))
        model = _VGGS.get(tuple(places))
        both = [f"{model}_cifar", model] if model else []
        return [Recognised(m, scheme) for m in both for scheme in naming.schemes(m)]
    if scheme in ("timm", "EfficientNet-PyTorch"):
        found = _lite(scheme, sum(units), body, file)
    else:
        found = _resnet(scheme, units, body, sign.stems)
    if found is None:
        raise InputError(
            f"unknown network: {scheme} naming, stages of {short(str(units))} units;"
            f" the known networks are {', '.join(models.names())}; others are read"
            " from ONNX files, or given from Python"
        )
    return [found]


def _lite(
    scheme: str, units: int, body: Mapping[str, Any], file: str
) -> Recognised | None:
    prefix = "" if scheme == "timm" else "_"
    channels = (*_shape(body, f"{prefix}conv_head.weight"), 0, 320)[1] or 320
    model = _LITES.get((units, channels))
    if model is None or _has(body, r"\.(se|_se_reduce)\."):  # EfficientNet-B0
        return None
    if scheme == "EfficientNet-PyTorch":
        return Recognised(f"tf_{model}", scheme)
    named = re.search(r"(tf[_-])?efficientnet[_-]lite", file.lower())
    if named is None:
        raise InputError(
            f"{model} and tf_{model} have the same names and shapes, and are different"
            " functions (padding and epsilon); teacher.model must name one of them"
        )
    form = "tf_" if named[1] else ""
    return Recognised(f"{form}{model}", scheme, "by the name of the file")


def _resnet(
    scheme: str,
    units: tuple[int, ...],
    body: Mapping[str, Any],
    stems: tuple[str, ...],
) -> Recognised | None:
    if scheme == "torchvision" and (
        _has(body, r"\.shortcut\.")
        or not (_has(body, r"\.downsample\.") or "fc.weight" in body)
    ):
        scheme = "He"
    bottlenecks = _has(body, r"\.(conv3|layer\.2)\.")
    if units in _CIFAR and not bottlenecks:
        shortcuts = _has(body, r"\.(identity_conv|downsample|shortcut)\.")
        return Recognised(_CIFAR[units] + ("" if shortcuts else "a"), scheme)
    model = RESNETS.get((units, bottlenecks))
    if model is None:
        return None
    if any(_shape(body, stem)[2:] == (3, 3) for stem in stems):
        return Recognised(f"{model}_cifar", scheme, _STEM_NOTE)
    if model != "resnet50":
        return Recognised(model, scheme)
    if scheme == "pytorchcv":
        where, other = "in the first 1x1 convolution (resnet50)", "resnet50b"
    else:
        model, other = "resnet50b", "resnet50"
        where = "in the 3x3 convolution (resnet50b)"
    return Recognised(model, scheme, _STRIDE_NOTE.format(where=where, other=other))
