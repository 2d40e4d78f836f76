"""ResNets of four stages (He et al., 2016), for ImageNet and for small images.

ImageNet's begin with a 7x7 convolution of stride 2 and a max-pool. Those for small
images, of many CIFAR scripts, begin with a 3x3 convolution of stride 1.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.layers import ConvBlock, Dense


class ResNet(nn.Module):
    """ResNet: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
      units: number of units in each of the four stages.
      unit: `blocks.BasicUnit` or `blocks.Bottleneck`, or a partial of one of them.
      features: output channels of the first stage; every further stage has twice as
        many as the one before it.
      small_images: whether it begins with a 3x3 convolution of stride 1, and without a
        max-pool.
    """

    num_classes: int
    units: tuple[int, ...]
    unit: Callable[..., nn.Module]
    features: int
    small_images: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, stride = (3, 1) if self.small_images else (7, 2)
        x = ConvBlock(64, size, stride, name="init_block")(x)
        x = nn.relu(x)
        if not self.small_images:
            # The pool pads with -inf, so padding is never the maximum.
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, units in enumerate(self.units, 1):
            for unit in range(1, units + 1):
                x = self.unit(
                    self.features * 2 ** (stage - 1),
                    2 if stage > 1 and unit == 1 else 1,
                    name=f"stage{stage}_unit{unit}",
                )(x)
        return Dense(self.num_classes, name="output")(jnp.mean(x, (1, 2)))
