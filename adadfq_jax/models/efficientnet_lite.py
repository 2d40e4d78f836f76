"""EfficientNet-Lite0 (TensorFlow, 2020), built of Flax's own layers alone.

It is EfficientNet without squeeze-and-excitation and with ReLU6 everywhere. Unlike the
other networks here it has batch norms of epsilon 1e-3 and TensorFlow's padding: at
stride 2 an image of even size gets more zeros after than before. Files of P expect
images (pixels - 127) / 128.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class Stage(NamedTuple):
    """The units of a stage.

    Attributes:
      expansion: width inside, as a multiple of the input channels.
      features: number of output channels.
      units: number of units.
      stride: stride of the first unit.
      size: size of the depthwise kernels.
    """

    expansion: int
    features: int
    units: int
    stride: int
    size: int


STAGES = (
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)


class ConvNorm(nn.Module):
    """A convolution without bias, `conv`, then a batch norm in inference, `bn`."""

    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            self.stride,
            padding="SAME",
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x)


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution and linear 1x1 projection.

    The input is added where it has the shape of the output.

    Attributes:
      features: number of output channels.
      expansion: width inside, as a multiple of the input channels; with 1 there is no
        expansion convolution.
      stride: stride of the depthwise convolution.
      size: size of the depthwise kernel.
    """

    features: int
    expansion: int
    stride: int
    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, y = self.expansion * x.shape[-1], x
        if self.expansion != 1:
            y = nn.relu6(ConvNorm(width, name="conv1")(y))
        y = ConvNorm(width, self.size, self.stride, groups=width, name="conv2")(y)
        y = ConvNorm(self.features, name="conv3")(nn.relu6(y))
        return x + y if y.shape == x.shape else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu6(ConvNorm(32, 3, 2, name="init_block")(x))
        for number, stage in enumerate(STAGES, 1):
            for unit in range(1, stage.units + 1):
                x = MBConv(
                    stage.features,
                    stage.expansion,
                    stage.stride if unit == 1 else 1,
                    stage.size,
                    name=f"stage{number}_unit{unit}",
                )(x)
        x = nn.relu6(ConvNorm(1280, name="final_block")(x))
        return nn.Dense(self.num_classes, name="output")(jnp.mean(x, (1, 2)))
