"""Top-1 accuracy of a network over a whole evaluation set."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax import data, sharding


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """uint8 pixels [..., C] -> float32 (x / 255 - mean) / std."""
    return (images / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


class Evaluator:
    """Measures one network, compiled once, on one evaluation set.

    Args:
      apply: variables, normalised images -> logits.
      eval_set: the images and labels.
      mean: per-channel mean of P's normalisation, for pixels in [0, 1].
      std: its standard deviation.
      batch_size: global batch; rounded up to a multiple of the devices.
      devices: local devices.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        eval_set: data.EvalSet,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        devices: Sequence[jax.Device],
    ):
        def count(variables, images, labels, mask):
            logits = apply(variables, normalise(images, mean, std))
            return jnp.sum(mask * (jnp.argmax(logits, -1) == labels)), jnp.sum(mask)

        self._eval_set = eval_set
        self._batch_size = -(-batch_size // len(devices)) * len(devices)
        self._count = sharding.parallel_count(count, devices)

    def top1(self, variables: Any) -> float:
        """Accuracy in per cent over the whole set."""
        batches = data.batches(self._eval_set, self._batch_size)
        counts = [self._count(variables, *batch) for batch in batches]
        correct, total = np.asarray(sharding.fetch(counts), np.float64).sum(0)
        return float(100 * correct / total)
