"""CIFAR ResNets (He et al., 2016, section 4.2).

A 3x3 convolution to 16 channels is followed by three stages of 16, 32 and 64 channels.
The first unit of stages 2 and 3 has stride 2. Its shortcut is zero-padded, or a 1x1
convolution with batch norm as in the pytorchcv model zoo, whose checkpoints the paper
used.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.blocks import BasicUnit
from adadfq_jax.models.layers import ConvBlock, Dense


class ResNetCifar(nn.Module):
    """CIFAR ResNet: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
      units: number n of units in each of the three stages; the depth is 6n + 2.
      pad_shortcut: see `blocks.BasicUnit`.
    """

    num_classes: int
    units: int
    pad_shortcut: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBlock(16, name="init_block")(x)
        x = nn.relu(x)
        for stage in range(1, 4):
            for unit in range(1, self.units + 1):
                stride = 2 if stage > 1 and unit == 1 else 1
                x = BasicUnit(
                    8 * 2**stage,
                    stride,
                    self.pad_shortcut,
                    name=f"stage{stage}_unit{unit}",
                )(x)
        x = jnp.mean(x, (1, 2))
        return Dense(self.num_classes, name="output")(x)
