"""CIFAR ResNets (He et al., 2016, section 4.2) with 1x1 convolution shortcuts.

The variant of the pytorchcv model zoo, whose checkpoints the paper used: 3x3
convolution to 16, three stages of 16, 32 and 64 channels, stride 2 at the first
unit of stages 2 and 3, where the shortcut is a 1x1 convolution with batch norm.
One module serves as P (`act_quant=Identity`) and as Q (a partial of `ActQuant`).
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.layers import ConvBlock, Dense, Identity


class Unit(nn.Module):
    """Two 3x3 convolutions and a shortcut; the sum is rectified and quantized."""

    features: int
    stride: int
    act_quant: Callable[..., nn.Module] = Identity

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            block = ConvBlock(self.features, 1, self.stride, name="identity_conv")
            shortcut = block(x)
        y = ConvBlock(self.features, 3, self.stride, name="conv1")(x)
        y = self.act_quant(name="conv1_quant")(nn.relu(y))
        y = ConvBlock(self.features, 3, name="conv2")(y)
        return self.act_quant(name="quant")(nn.relu(y + shortcut))


class ResNetCifar(nn.Module):
    """CIFAR ResNet: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
      units: units in each of the three stages (3 makes ResNet-20).
      act_quant: makes the layer after every ReLU; `Identity` for P.
    """

    num_classes: int
    units: int = 3
    act_quant: Callable[..., nn.Module] = Identity

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBlock(16, name="init_block")(x)
        x = self.act_quant(name="init_quant")(nn.relu(x))
        for stage in range(1, 4):
            for unit in range(1, self.units + 1):
                stride = 2 if stage > 1 and unit == 1 else 1
                name = f"stage{stage}_unit{unit}"
                x = Unit(8 * 2**stage, stride, self.act_quant, name=name)(x)
        x = jnp.mean(x, (1, 2))
        return Dense(self.num_classes, name="output")(x)
