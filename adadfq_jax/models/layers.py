"""Flax layers that networks and generators are built of.

Parameters are float32. Layers compute in the dtype of their input, which is also the
dtype of their output; batch norms always compute in float32.

A layer has no mode flag. The collections that are mutable in `apply` say what it does:

    collection    read as                       when mutable
    params        trained parameters            -
    batch_stats   running mean and variance     batch norm uses the batch's own
                                                statistics and moves the averages
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.convolution import conv, upsample_conv

Initializer = Callable[..., Array]


def uniform(bound: float) -> Initializer:
    """Make an initializer that draws uniformly from [-bound, bound]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def per_channel(values: Array, x: Array) -> Array:
    """Broadcast values [C] to the rank of x [..., C]."""
    return jax.lax.broadcast_to_rank(values, x.ndim)


def moments(x: Array, axis_name: str | None = None) -> tuple[Array, Array]:
    """Compute mean and biased variance of each channel of x [..., C], in float32.

    They are those of the global batch. The mean is computed in a first pass, so that
    the variance loses no digits to cancellation.
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
    variance = jnp.mean(jnp.square(x - per_channel(mean, x)), axes)
    if axis_name is not None:
        variance = jax.lax.pmean(variance, axis_name)
    return mean, variance


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias. Mean and variance are the
    running statistics, or the batch's own (with the biased variance) while the
    collection `batch_stats` is mutable. The running variance moves by the batch's
    unbiased variance, as in PyTorch.

    Attributes:
      epsilon: a number that is added to the variance.
      momentum: weight of the old running statistics.
      use_scale: whether there are a trained scale and bias.
      axis_name: mapped axis over which batch statistics are shared, or None.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    use_scale: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        use_mean, use_var = mean.value, var.value
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            use_mean, use_var = moments(x, self.axis_name)
            devices = 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
            count = devices * x.size // channels
            unbiased = use_var * (count / max(count - 1, 1))
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * use_mean
            var.value = keep * var.value + (1 - keep) * unbiased
        y = x.astype(use_mean.dtype) - per_channel(use_mean, x)
        y = y * per_channel(jax.lax.rsqrt(use_var + self.epsilon), x)
        if self.use_scale:
            scale = self.param("scale", nn.initializers.ones, (channels,))
            bias = self.param("bias", nn.initializers.zeros, (channels,))
            y = y * per_channel(scale, x) + per_channel(bias, x)
        return y.astype(x.dtype)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and bias depend on the label (de Vries et al., 2017).

    y = (x - mean) / sqrt(var + epsilon) * scale[label] + bias[label], for x [B, H, W,
    C] and labels [B]. scale and bias are [num_classes, C]; they start at 1 and 0.

    Attributes:
      num_classes: number of labels.
      epsilon: a number that is added to the variance.
      axis_name: see `BatchNorm`.
    """

    num_classes: int
    epsilon: float = 1e-5
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, labels: Array) -> Array:
        shape = (self.num_classes, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        norm = BatchNorm(
            self.epsilon, use_scale=False, axis_name=self.axis_name, name="bn"
        )
        y = norm(x).astype(scale.dtype) * scale[labels][:, None, None]
        y = y + bias[labels][:, None, None]
        return y.astype(x.dtype)


class Conv(nn.Module):
    """2-D convolution with symmetric zero padding of size // 2, at any stride.

    XLA's 'SAME' pads differently at stride 2. The kernel [size, size, in / groups, out]
    starts uniform in +-gain / sqrt(fan_in), the bias uniform in +-1 / sqrt(fan_in). The
    output channels are the last axis, also with groups.
    """

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    gain: float = 6**0.5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1] // self.groups
        shape = (self.size, self.size, channels, self.features)
        bound = math.prod(shape[:-1]) ** -0.5
        kernel = self.param("kernel", uniform(self.gain * bound), shape)
        y = conv(x, kernel.astype(x.dtype), self.stride, self.groups)
        if self.use_bias:
            bias = self.param("bias", uniform(bound), (self.features,))
            y = y.astype(bias.dtype) + per_channel(bias, y)
        return y.astype(x.dtype)


class Dense(nn.Module):
    """Dense layer [..., in] -> [..., features].

    Kernel and bias start uniform in +-1 / sqrt(in).
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = uniform(x.shape[-1] ** -0.5)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        y = x @ kernel.astype(x.dtype)
        y = y.astype(bias.dtype) + per_channel(bias, y)
        return y.astype(x.dtype)


class UpsampleConv(nn.Module):
    """2x nearest upsampling, then a 3x3 convolution with bias; see `upsample_conv`."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        init = uniform(math.prod(shape[:-1]) ** -0.5)
        y = upsample_conv(x, self.param("kernel", init, shape).astype(x.dtype))
        bias = self.param("bias", init, (self.features,))
        y = y.astype(bias.dtype) + per_channel(bias, y)
        return y.astype(x.dtype)


class ConvBlock(nn.Module):
    """A convolution without bias, named `conv`, then a batch norm, named `bn`."""

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, self.size, self.stride, self.groups, name="conv")(x)
        return BatchNorm(name="bn")(x)
