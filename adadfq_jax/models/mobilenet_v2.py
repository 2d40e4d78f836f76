"""MobileNetV2 (Sandler et al., 2018), in the two forms that files have, and small."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.blocks import InvertedResidual
from adadfq_jax.models.layers import Conv, ConvBlock, Dense

# Channels out of every unit; the first of stages 2 and on has stride 2.
STAGES = (
    (16,),
    (24, 24),
    (32, 32, 32),
    (64, 64, 64, 64, 96, 96, 96),
    (160, 160, 160, 320),
)
SMALL_STAGES = ((8,), (16, 16), (24, 24, 24), (48, 48))  # for images of 28 or 32


class MobileNetV2(nn.Module):
    """MobileNetV2: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
      zoo_form: of the pytorchcv zoo: the first unit, whose expansion is 1, has an
        expansion convolution all the same, and the classifier is a 1x1 convolution
        without bias. Otherwise there is no such convolution, and the classifier is
        dense with bias.
      stages: channels out of every unit.
      ends: channels of the first and of the last convolution.
      stride: of the first convolution.
    """

    num_classes: int
    zoo_form: bool = False
    stages: tuple[tuple[int, ...], ...] = STAGES
    ends: tuple[int, int] = (32, 1280)
    stride: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBlock(self.ends[0], 3, self.stride, name="init_block")(x)
        x = nn.relu6(x)
        for stage, widths in enumerate(self.stages, 1):
            for unit, features in enumerate(widths, 1):
                x = InvertedResidual(
                    features,
                    2 if stage > 1 and unit == 1 else 1,
                    1 if stage == 1 else 6,
                    self.zoo_form or stage > 1,
                    name=f"stage{stage}_unit{unit}",
                )(x)
        x = ConvBlock(self.ends[1], 1, name="final_block")(x)
        x = nn.relu6(x)
        x = jnp.mean(x, (1, 2), keepdims=self.zoo_form)
        if self.zoo_form:
            return Conv(self.num_classes, 1, name="output")(x)[:, 0, 0]
        return Dense(self.num_classes, name="output")(x)
