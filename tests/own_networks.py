"""A network from outside the package."""

import flax.linen as nn

from adadfq_jax.models import layers

SHAPE = (16, 16, 3)


class Small(nn.Module):
    """One convolution of the package and one of Flax; batch norms of both."""

    @nn.compact
    def __call__(self, x, train=False):
        x = layers.BatchNorm()(nn.Conv(8, (3, 3), strides=2)(x))
        x = layers.Conv(8, stride=2)(nn.relu(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(4)(nn.relu(x).reshape(x.shape[0], -1))
