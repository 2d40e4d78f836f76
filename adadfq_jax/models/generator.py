"""The class-conditional generator G of the CIFAR configurations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax.layers import BatchNorm, Conv, Dense, UpsampleConv

LATENT_SIZE = 100
INNER_EPSILON = 0.8  # of the two inner batch norms (released code)


class CifarGenerator(nn.Module):
    """Latents [B, latent] and labels [B] -> images [B, H, W, channels].

    embedding[y] * z -> dense to 128 maps of H/4 x W/4 -> BN -> twice (2x nearest,
    conv3x3, BN, LeakyReLU 0.2) with 128 and 64 channels -> conv3x3 -> tanh -> BN
    without scale and bias. Images live in P's normalised space: each channel has
    mean 0 and variance 1 over the batch.

    Attributes:
      num_classes: number of labels.
      image_shape: (H, W, channels); H and W divisible by 4.
      axis_name: mapped axis of the global batch, or None.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, latents: Array, labels: Array) -> Array:
        height, width, channels = self.image_shape
        shape = (self.num_classes, latents.shape[-1])
        embedding = self.param("embedding", nn.initializers.normal(1.0), shape)
        x = (embedding[labels] * latents).astype(latents.dtype)
        x = Dense(128 * (height // 4) * (width // 4), name="dense")(x)
        # Channels first, so that weights of the original fit unchanged.
        x = x.reshape(-1, 128, height // 4, width // 4).transpose(0, 2, 3, 1)
        x = self._norm("dense_bn", 1e-5)(x)
        x = UpsampleConv(128, name="conv1")(x)
        x = nn.leaky_relu(self._norm("conv1_bn", INNER_EPSILON)(x), 0.2)
        x = UpsampleConv(64, name="conv2")(x)
        x = nn.leaky_relu(self._norm("conv2_bn", INNER_EPSILON)(x), 0.2)
        x = jnp.tanh(Conv(channels, use_bias=True, gain=1.0, name="conv3")(x))
        return self._norm("image_bn", 1e-5, use_scale=False)(x)

    def _norm(self, name: str, epsilon: float, use_scale: bool = True) -> BatchNorm:
        return BatchNorm(
            epsilon, use_scale=use_scale, axis_name=self.axis_name, name=name
        )


def draw_inputs(key: Array, batch_size: int, num_classes: int) -> tuple[Array, Array]:
    """Latents z ~ N(0, I), [B, 100], and labels uniform in [0, C), int32 [B]."""
    latent_key, label_key = jax.random.split(key)
    latents = jax.random.normal(latent_key, (batch_size, LATENT_SIZE))
    return latents, jax.random.randint(label_key, (batch_size,), 0, num_classes)
