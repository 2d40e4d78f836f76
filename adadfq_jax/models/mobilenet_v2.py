"""MobileNetV2 (Sandler et al., 2018): the two forms of published files, a small one."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.blocks import InvertedResidual
from adadfq_jax.models.layers import Conv, ConvBlock, Dense

# Output channels of every unit. The first unit of each later stage has stride 2.
STAGES = (
    (16,),
    (24, 24),
    (32, 32, 32),
    (64, 64, 64, 64, 96, 96, 96),
    (160, 160, 160, 320),
)
SMALL_STAGES = ((8,), (16, 16), (24, 24, 24), (48, 48))  # for images of side 28 or 32


class MobileNetV2(nn.Module):
    """MobileNetV2: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
      zoo_form: whether the network has the form of the pytorchcv zoo: the first unit,
        whose expansion is 1, has an expansion convolution nevertheless, and the
        classifier is a 1x1 convolution without bias. Without it, the first unit has no
        expansion convolution, and the classifier is a dense layer with bias.
      stages: output channels of every unit.
      ends: output channels of the first and of the last convolution.
      stride: stride of the first convolution.
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
