"""VGG networks with batch norms (Simonyan and Zisserman, 2015)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.layers import BatchNorm, Conv, Dense

WIDTHS = (64, 128, 256, 512, 512)  # output channels of the five stages


class ConvUnit(nn.Module):
    """A 3x3 convolution with bias, `conv`, a batch norm, `bn`, and a ReLU."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, use_bias=True, name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x))


def average_pool(x: Array, size: int) -> Array:
    """Average x [B, H, W, C] to [B, size, size, C], as PyTorch's adaptive pooling does.

    Window i of n pixels goes from floor(i * n / size) to ceil((i + 1) * n / size).
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n == size:
            continue
        windows = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        x = jnp.concatenate(
            [
                jnp.mean(x[:, a:b] if axis == 1 else x[:, :, a:b], axis, keepdims=True)
                for a, b in windows
            ],
            axis,
        )
    return x


class VGG(nn.Module):
    """VGG: images [B, H, W, channels] in normalised space -> logits.

    Attributes:
      num_classes: length of the logits.
      units: number of convolutions in each of the five stages; a max-pool ends a stage.
      hidden: widths of the dense layers before the last one, each with a ReLU.
      pool: height and width of what the dense layers get.
    """

    num_classes: int
    units: tuple[int, ...]
    hidden: tuple[int, ...] = (4096, 4096)
    pool: int = 7

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for stage, (units, features) in enumerate(
            zip(self.units, WIDTHS, strict=True), 1
        ):
            for unit in range(1, units + 1):
                first = stage == unit == 1
                name = "init_block" if first else f"stage{stage}_unit{unit}"
                x = ConvUnit(features, name=name)(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = average_pool(x, self.pool)
        # Dense weights of files are for channels before pixels.
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        for number, width in enumerate(self.hidden, 1):
            x = nn.relu(Dense(width, name=f"hidden{number}")(x))
        return Dense(self.num_classes, name="output")(x)
