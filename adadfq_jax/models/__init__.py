"""Networks by name: `get_model(name, num_classes=...)`.

| names | what |
|---|---|
| resnet20, 32, 44, 56, 110 | CIFAR ResNets, 1x1 convolutions as shortcuts (pytorchcv) |
| resnet20a, ..., resnet110a | the same, with zero-padded shortcuts (He et al., 2016) |
| resnet18, resnet34 | ImageNet ResNets of basic units |
| resnet50 | stride in the first 1x1 convolution (He et al., pytorchcv) |
| resnet50b | stride in the 3x3 convolution (torchvision, timm) |
| resnet18_cifar, 34, 50 | the same with a 3x3 stem, for small images |
| vgg11_bn, 13, 16, 19 | with batch norms and three dense layers (torchvision, timm) |
| vgg11_bn_cifar, 13, 16, 19 | with one dense layer, for small images |
| mobilenetv2_w1 | expansion in the first unit, no bias in the classifier (pytorchcv) |
| mobilenet_v2 | without that expansion, with that bias (torchvision, timm) |
| mobilenetv2_small | narrow and shallow, stride 1 at the start, for small images |
| tf_efficientnet_lite0, 1, 2 | TensorFlow's, written with Flax's own layers alone |
| efficientnet_lite0, 1, 2 | the same with PyTorch's padding and epsilon (timm) |
| tiny | two convolutions, for tests |
"""

import functools
from collections.abc import Callable

import flax.linen as nn

from adadfq_jax.errors import InputError
from adadfq_jax.models.blocks import BasicUnit, Bottleneck
from adadfq_jax.models.efficientnet_lite import EfficientNetLite, scaled
from adadfq_jax.models.mobilenet_v2 import SMALL_STAGES, MobileNetV2
from adadfq_jax.models.resnet import ResNet
from adadfq_jax.models.resnet_cifar import ResNetCifar
from adadfq_jax.models.tiny import Tiny
from adadfq_jax.models.vgg import VGG

_bind = functools.partial

CIFAR_UNITS = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}  # units in a stage, by depth
_BOTTLENECK_B = _bind(Bottleneck, stride_in_3x3=True)
_SMALL = _bind(ResNet, small_images=True)
VGG_UNITS = {  # convolutions in a stage, by depth
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
LITE_FACTORS = ((1, 1), (1, 1.1), (1.1, 1.2))  # width and depth of Lite0 to Lite2

_MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{d}": _bind(ResNetCifar, units=n) for d, n in CIFAR_UNITS.items()},
    **{
        f"resnet{d}a": _bind(ResNetCifar, units=n, pad_shortcut=True)
        for d, n in CIFAR_UNITS.items()
    },
    "resnet18": _bind(ResNet, units=(2, 2, 2, 2), unit=BasicUnit, features=64),
    "resnet34": _bind(ResNet, units=(3, 4, 6, 3), unit=BasicUnit, features=64),
    "resnet50": _bind(ResNet, units=(3, 4, 6, 3), unit=Bottleneck, features=256),
    "resnet50b": _bind(ResNet, units=(3, 4, 6, 3), unit=_BOTTLENECK_B, features=256),
    "resnet18_cifar": _bind(_SMALL, units=(2, 2, 2, 2), unit=BasicUnit, features=64),
    "resnet34_cifar": _bind(_SMALL, units=(3, 4, 6, 3), unit=BasicUnit, features=64),
    "resnet50_cifar": _bind(
        _SMALL, units=(3, 4, 6, 3), unit=_BOTTLENECK_B, features=256
    ),
    **{f"vgg{d}_bn": _bind(VGG, units=n) for d, n in VGG_UNITS.items()},
    **{
        f"vgg{d}_bn_cifar": _bind(VGG, units=n, hidden=(), pool=1)
        for d, n in VGG_UNITS.items()
    },
    "mobilenetv2_w1": _bind(MobileNetV2, zoo_form=True),
    "mobilenet_v2": _bind(MobileNetV2),
    "mobilenetv2_small": _bind(
        MobileNetV2, stages=SMALL_STAGES, ends=(16, 256), stride=1
    ),
    **{
        f"{form}efficientnet_lite{n}": _bind(
            EfficientNetLite, stages=scaled(*factors), symmetric=not form
        )
        for n, factors in enumerate(LITE_FACTORS)
        for form in ("tf_", "")
    },
    "tiny": Tiny,
}


def names() -> list[str]:
    """Return the names of the package's networks, sorted."""
    return sorted(_MODELS)


def usual_image_shape(name: str, channels: int) -> tuple[int, int, int]:
    """Return the (H, W, channels) that a network is used with most.

    Networks for small images have those of CIFAR, or of MNIST with one channel.
    """
    small = issubclass(type(get_model(name, num_classes=2)), ResNetCifar | Tiny)
    side = {"lite1": 240, "lite2": 260}.get(name[-5:], 224)
    if small or name == "mobilenetv2_small" or name.endswith("_cifar"):
        side = 28 if channels == 1 else 32
    return side, side, channels


def get_model(name: str, *, num_classes: int) -> nn.Module:
    """Make the network `name`.

    Args:
      name: one of `names()`.
      num_classes: length of the logits.

    Returns:
      A Linen module that maps images [B, H, W, channels] in normalised space to logits
      [B, num_classes]. It runs in inference unless the collection `batch_stats` is
      mutable.

    Raises:
      InputError: there is no such network.
    """
    if name not in _MODELS:
        raise InputError(
            f"unknown network {name!r}; one of your own needs its code: in Python, call"
            " adadfq_jax.load_quantized(path, network); known are:"
            f" {', '.join(names())}"
        )
    return _MODELS[name](num_classes=num_classes)
