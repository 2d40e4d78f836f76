"""The residual units that the networks are built of."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.layers import ConvBlock


def zero_padded(x: Array, features: int, stride: int) -> Array:
    """Make a shortcut without parameters (He et al., 2016, option A).

    The result has every stride-th pixel of x [B, H, W, in], with equally many zero
    channels before and after: [B, ceil(H / stride), ceil(W / stride), features].
    """
    side = (features - x.shape[-1]) // 2
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (side, side)))


class BasicUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut; a ReLU follows their sum.

    Attributes:
      features: number of output channels.
      stride: stride of the first convolution and the shortcut.
      pad_shortcut: whether a shortcut that changes the shape is `zero_padded` rather
        than a 1x1 convolution with batch norm.
    """

    features: int
    stride: int
    pad_shortcut: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.pad_shortcut:
                shortcut = zero_padded(x, self.features, self.stride)
            else:
                block = ConvBlock(self.features, 1, self.stride, name="identity_conv")
                shortcut = block(x)
        y = ConvBlock(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(y)
        y = ConvBlock(self.features, 3, name="conv2")(y)
        return nn.relu(y + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, a quarter as wide inside, and a shortcut.

    Attributes:
      features: number of output channels.
      stride: stride of one of the convolutions and of the shortcut.
      stride_in_3x3: whether the 3x3 convolution has the stride rather than the first
        1x1 convolution.
    """

    features: int
    stride: int
    stride_in_3x3: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            block = ConvBlock(self.features, 1, self.stride, name="identity_conv")
            shortcut = block(x)
        strides = (1, self.stride) if self.stride_in_3x3 else (self.stride, 1)
        y = ConvBlock(self.features // 4, 1, strides[0], name="conv1")(x)
        y = nn.relu(y)
        y = ConvBlock(self.features // 4, 3, strides[1], name="conv2")(y)
        y = nn.relu(y)
        y = ConvBlock(self.features, 1, name="conv3")(y)
        return nn.relu(y + shortcut)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3 and linear 1x1 projection.

    The input is added where it has the shape of the output.

    Attributes:
      features: number of output channels.
      stride: stride of the depthwise convolution.
      expansion: width inside, as a multiple of the input channels.
      expand: whether there is the first 1x1 convolution.
    """

    features: int
    stride: int
    expansion: int
    expand: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, y = self.expansion * x.shape[-1], x
        if self.expand:
            y = ConvBlock(width, 1, name="conv1")(y)
            y = nn.relu6(y)
        y = ConvBlock(width, 3, self.stride, groups=width, name="conv2")(y)
        y = nn.relu6(y)
        y = ConvBlock(self.features, 1, name="conv3")(y)
        return x + y if y.shape == x.shape else y
