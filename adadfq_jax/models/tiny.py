"""A network for tests: two convolutions, everything that a real one has, in no time."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.layers import ConvBlock, Dense


class Tiny(nn.Module):
    """Images [B, H, W, channels] in normalised space -> logits [B, num_classes]."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBlock(8, stride=2, name="init_block")(x)
        x = nn.relu(x)
        x = ConvBlock(16, stride=2, name="unit")(x)
        x = nn.relu(x)
        return Dense(self.num_classes, name="output")(jnp.mean(x, (1, 2)))
