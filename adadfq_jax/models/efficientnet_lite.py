"""EfficientNet-Lite0 to 2 (TensorFlow, 2020), built of Flax's own layers alone.

They are EfficientNets without squeeze-and-excitation and with ReLU6 everywhere. Two
forms have the same variables. TensorFlow's has batch norms of epsilon 1e-3, and at
stride 2 it gives an image of even size more zeros after than before; its files of P
expect images (pixels - 127) / 128. PyTorch's has epsilon 1e-5 and equally many zeros on
both sides.
"""

import functools
import math
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


def scaled(width: float, depth: float) -> tuple[Stage, ...]:
    """Return the stages of a larger network (Tan and Le, 2019, section 3.3).

    Args:
      width: factor of the output channels, which become multiples of 8 and lose at most
        a tenth.
      depth: factor of the numbers of units, except in the first and the last stage.
    """

    def channels(features: int) -> int:
        nearest = max(8, int(width * features + 4) // 8 * 8)
        return nearest + 8 if nearest < 0.9 * width * features else nearest

    ends = (STAGES[0], STAGES[-1])
    return tuple(
        stage._replace(
            features=channels(stage.features),
            units=stage.units if stage in ends else math.ceil(depth * stage.units),
        )
        for stage in STAGES
    )


class ConvNorm(nn.Module):
    """A convolution without bias, `conv`, then a batch norm in inference, `bn`.

    Attributes:
      features: number of output channels.
      size: of the kernel.
      stride: of the convolution.
      groups: of channels.
      symmetric: whether the network is PyTorch's form rather than TensorFlow's.
    """

    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1
    symmetric: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            self.stride,
            padding=self.size // 2 if self.symmetric else "SAME",
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        epsilon = 1e-5 if self.symmetric else 1e-3
        return nn.BatchNorm(use_running_average=True, epsilon=epsilon, name="bn")(x)


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution and linear 1x1 projection.

    The input is added where it has the shape of the output.

    Attributes:
      features: number of output channels.
      expansion: width inside, as a multiple of the input channels; with 1 there is no
        expansion convolution.
      stride: stride of the depthwise convolution.
      size: size of the depthwise kernel.
      symmetric: see `ConvNorm`.
    """

    features: int
    expansion: int
    stride: int
    size: int
    symmetric: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, y = self.expansion * x.shape[-1], x
        norm = functools.partial(ConvNorm, symmetric=self.symmetric)
        if self.expansion != 1:
            y = nn.relu6(norm(width, name="conv1")(y))
        y = norm(width, self.size, self.stride, groups=width, name="conv2")(y)
        y = norm(self.features, name="conv3")(nn.relu6(y))
        return x + y if y.shape == x.shape else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
      stages: the stages.
      symmetric: see `ConvNorm`.
    """

    num_classes: int
    stages: tuple[Stage, ...] = STAGES
    symmetric: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = functools.partial(ConvNorm, symmetric=self.symmetric)
        x = nn.relu6(norm(32, 3, 2, name="init_block")(x))
        for number, stage in enumerate(self.stages, 1):
            for unit in range(1, stage.units + 1):
                x = MBConv(
                    stage.features,
                    stage.expansion,
                    stage.stride if unit == 1 else 1,
                    stage.size,
                    self.symmetric,
                    name=f"stage{number}_unit{unit}",
                )(x)
        x = nn.relu6(norm(1280, name="final_block")(x))
        return nn.Dense(self.num_classes, name="output")(jnp.mean(x, (1, 2)))
