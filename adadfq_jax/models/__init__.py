"""Networks by name: `get_model(name, num_classes=...)`.

| names | what |
|---|---|
| resnet20, 32, 44, 56, 110 | CIFAR ResNets, 1x1 convolutions as shortcuts (pytorchcv) |
| resnet20a, ..., resnet110a | the same with zero-padded shortcuts (He et al., 2016) |
| resnet18, resnet34 | ImageNet ResNets of basic units |
| resnet50 | stride in the first 1x1 convolution (He et al., pytorchcv) |
| resnet50b | stride in the 3x3 convolution (torchvision, timm) |
| mobilenetv2_w1 | expansion in the first unit, no bias at the end (pytorchcv) |
| mobilenet_v2 | without that expansion, with a bias (torchvision, timm) |
| mobilenetv2_small | narrow and shallow, stride 1 at the start, for small images |
| efficientnet_lite0 | of TensorFlow, written with Flax's own layers alone |
| tiny | two convolutions, for tests |
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np

from adadfq_jax.errors import InputError
from adadfq_jax.models.blocks import BasicUnit, Bottleneck
from adadfq_jax.models.efficientnet_lite import EfficientNetLite0
from adadfq_jax.models.layers import ActQuant, Identity
from adadfq_jax.models.mobilenet_v2 import SMALL_STAGES, MobileNetV2
from adadfq_jax.models.resnet import ResNet
from adadfq_jax.models.resnet_cifar import ResNetCifar
from adadfq_jax.models.tiny import Tiny

_bind = functools.partial

CIFAR_UNITS = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}  # by depth, in each stage
_BOTTLENECK_B = _bind(Bottleneck, stride_in_3x3=True)

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
    "mobilenetv2_w1": _bind(MobileNetV2, zoo_form=True),
    "mobilenet_v2": _bind(MobileNetV2),
    "mobilenetv2_small": _bind(
        MobileNetV2, stages=SMALL_STAGES, ends=(16, 256), stride=1
    ),
    "efficientnet_lite0": EfficientNetLite0,
    "tiny": Tiny,
}


def names() -> list[str]:
    """Names of the package's networks, sorted."""
    return sorted(_MODELS)


def get_model(
    name: str, *, num_classes: int, act_quant: Callable[..., nn.Module] = Identity
) -> nn.Module:
    """The network `name`, as P or as Q.

    Args:
      name: one of `names()`.
      num_classes: length of the logits.
      act_quant: makes the layer that follows every ReLU: `layers.Identity` for
        P, `functools.partial(layers.ActQuant, bits=...)` for Q.

    Returns:
      A Linen module, images [B, H, W, channels] -> logits [B, num_classes]. The
      trees of P and Q are the same; Q has the collection `ranges` besides.

    Raises:
      InputError: there is no such network.
    """
    if name not in _MODELS:
        raise InputError(
            f"unknown network {name!r}; known are: {', '.join(names())}; one of your"
            " own is read by adadfq_jax.load_quantized(path, model)"
        )
    if act_quant is Identity:  # P; EfficientNetLite0 has no place for quantizers
        return _MODELS[name](num_classes=num_classes)
    return _MODELS[name](num_classes=num_classes, act_quant=act_quant)


def first_and_last(
    model: nn.Module, image_shape: tuple[int, ...]
) -> tuple[str, str, str]:
    """Names of a network's first kernel, of its last, and of its last quantizer.

    That quantizer's activations, pooled as a rule, are the last layer's input. The
    first layer's are the images, which have no quantizer. Names are module paths joined
    by dots, with `.kernel` for a kernel.
    """
    kernels, quantizers = [], []

    def look(call, args, kwargs, context):
        module, path = context.module, ".".join(context.module.path)
        output = call(*args, **kwargs)
        if isinstance(module, ActQuant):
            quantizers.append(path)
        elif module.has_variable("params", "kernel"):
            kernels.append(f"{path}.kernel")
        return output

    # As Q: Flax names a quantizer that the network does not name by its class.
    model = model.copy(act_quant=_bind(ActQuant, bits=8))
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    with nn.intercept_methods(look):
        jax.eval_shape(model.init, jax.random.key(0), image)
    return kernels[0], kernels[-1], quantizers[-1]
