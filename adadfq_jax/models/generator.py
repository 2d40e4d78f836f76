"""The class-conditional generators G of the CIFAR and the ImageNet configurations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax.models.layers import (
    BatchNorm,
    ConditionalBatchNorm,
    Conv,
    Dense,
    UpsampleConv,
)

LATENT_SIZE = 100
CHANNELS = 128  # of the first maps (released code)
INNER_EPSILON = 0.8  # epsilon of the two inner batch norms (released code)


class CifarGenerator(nn.Module):
    """G for CIFAR: latents [B, latent], labels [B] -> images [B, H, W, channels].

    embedding[y] * z -> dense to c maps of H/4 x W/4 -> BN -> twice (2x nearest,
    conv3x3, BN, LeakyReLU 0.2) with c and c/2 channels -> conv3x3 -> tanh -> BN
    without scale and bias. The images are in P's normalised space: each channel has
    mean 0 and variance 1 over the batch.

    Attributes:
      num_classes: number of labels.
      image_shape: (H, W, channels).
      axis_name: mapped axis over which the global batch is split, or None.
      channels: c, even; 128 in the released code.
    """

    num_classes: int
    image_shape: tuple[int, ...]
    axis_name: str | None = None
    channels: int = CHANNELS

    @nn.compact
    def __call__(self, latents: Array, labels: Array) -> Array:
        shape = (self.num_classes, latents.shape[-1])
        embedding = self.param("embedding", nn.initializers.normal(1.0), shape)
        x = embedding[labels] * latents.astype(embedding.dtype)
        x = x.astype(latents.dtype)
        x = _first_maps(x, self.image_shape, self.channels)
        x = self._norm("dense_bn", 1e-5)(x)
        x = UpsampleConv(self.channels, name="conv1")(x)
        x = nn.leaky_relu(self._norm("conv1_bn", INNER_EPSILON)(x), 0.2)
        x = UpsampleConv(self.channels // 2, name="conv2")(x)
        x = nn.leaky_relu(self._norm("conv2_bn", INNER_EPSILON)(x), 0.2)
        return _image(x, self.image_shape, self.axis_name)

    def _norm(self, name: str, epsilon: float) -> BatchNorm:
        return BatchNorm(epsilon, axis_name=self.axis_name, name=name)


class ImagenetGenerator(nn.Module):
    """G for ImageNet: a `CifarGenerator` with conditional batch norms for the label.

    The latents are not multiplied by an embedding. Instead, each of the three batch
    norms before the last has a scale and a bias for every label
    (`layers.ConditionalBatchNorm`).

    Attributes:
      num_classes: number of labels.
      image_shape: (H, W, channels).
      axis_name: mapped axis over which the global batch is split, or None.
      channels: channels of the first maps, see `CifarGenerator`.
    """

    num_classes: int
    image_shape: tuple[int, ...]
    axis_name: str | None = None
    channels: int = CHANNELS

    @nn.compact
    def __call__(self, latents: Array, labels: Array) -> Array:
        x = _first_maps(latents, self.image_shape, self.channels)
        x = self._norm("dense_bn", 1e-5)(x, labels)
        x = UpsampleConv(self.channels, name="conv1")(x)
        x = nn.leaky_relu(self._norm("conv1_bn", INNER_EPSILON)(x, labels), 0.2)
        x = UpsampleConv(self.channels // 2, name="conv2")(x)
        x = nn.leaky_relu(self._norm("conv2_bn", INNER_EPSILON)(x, labels), 0.2)
        return _image(x, self.image_shape, self.axis_name)

    def _norm(self, name: str, epsilon: float) -> ConditionalBatchNorm:
        return ConditionalBatchNorm(
            self.num_classes, epsilon, axis_name=self.axis_name, name=name
        )


def _first_maps(x: Array, image_shape: tuple[int, ...], channels: int) -> Array:
    """Apply a dense layer of the calling module: [B, n] -> maps [B, H/4, W/4, c]."""
    height, width = -(-image_shape[0] // 4), -(-image_shape[1] // 4)
    x = Dense(channels * height * width, name="dense")(x)
    # The dense layer has channels first, so that the original's weights fit unchanged.
    return x.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)


def _image(x: Array, image_shape: tuple[int, ...], axis_name: str | None) -> Array:
    """Apply the last layers of the calling module: features [B, H, W, c/2] -> images.

    Where the images' height or width is no multiple of 4, the features have the next
    multiple, and the middle is kept.
    """
    x = jnp.tanh(Conv(image_shape[2], use_bias=True, gain=1.0, name="conv3")(x))
    top, left = ((x.shape[i + 1] - image_shape[i]) // 2 for i in range(2))
    x = x[:, top : top + image_shape[0], left : left + image_shape[1]]
    return BatchNorm(use_scale=False, axis_name=axis_name, name="image_bn")(x)


def get_generator(
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    axis_name: str | None = None,
    channels: int = CHANNELS,
) -> nn.Module:
    """Make G by its name, config.game.generator: 'embedding' or 'conditional_bn'."""
    generators = {"embedding": CifarGenerator, "conditional_bn": ImagenetGenerator}
    return generators[name](num_classes, image_shape, axis_name, channels)


def draw_inputs(key: Array, batch_size: int, num_classes: int) -> tuple[Array, Array]:
    """Draw latents z ~ N(0, I), [B, 100], and uniform labels in [0, C), int32 [B]."""
    latent_key, label_key = jax.random.split(key)
    latents = jax.random.normal(latent_key, (batch_size, LATENT_SIZE))
    return latents, jax.random.randint(label_key, (batch_size,), 0, num_classes)
