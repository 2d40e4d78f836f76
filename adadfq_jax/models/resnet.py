"""ImageNet ResNets (He et al., 2016): 7x7 stem, max-pool, four stages of units."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.layers import ConvBlock, Dense


class ResNet(nn.Module):
    """ImageNet ResNet: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
      units: number of units in each of the four stages.
      unit: `blocks.BasicUnit` or `blocks.Bottleneck`, or a partial of one of them.
      features: output channels of the first stage; every further stage has twice as
        many as the one before it.
    """

    num_classes: int
    units: tuple[int, ...]
    unit: Callable[..., nn.Module]
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBlock(64, 7, 2, name="init_block")(x)
        x = nn.relu(x)
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
