"""A network from outside the package."""

import flax.linen as nn

from adadfq_jax.models import layers

SHAPE = (16, 16, 3)


class Small(nn.Module):
    """One convolution of the package and one of Flax; named and unnamed quantizers."""

    act_quant: type[nn.Module] = layers.Identity

    @nn.compact
    def __call__(self, x):
        x = layers.BatchNorm()(nn.Conv(8, (3, 3), strides=2)(x))
        x = self.act_quant()(nn.relu(x))
        x = layers.BatchNorm()(layers.Conv(8, stride=2)(x))
        x = self.act_quant()(nn.relu(x))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))
