"""A small network for tests: two convolutions with all parts of a real network."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.layers import ConvBlock, Dense


class Tiny(nn.Module):
    """Tiny: images [B, H, W, channels] in normalised space -> logits."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBlock(8, stride=2, name="init_block")(x)
        x = nn.relu(x)
        x = ConvBlock(16, stride=2, name="unit")(x)
        x = nn.relu(x)
        return Dense(self.num_classes, name="output")(jnp.mean(x, (1, 2)))
