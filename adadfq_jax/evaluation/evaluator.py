"""Top-1 accuracy of a network over a whole evaluation set."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax import evaluation
from adadfq_jax.runtime import multihost, sharding

_MOST_PENDING = 2  # batches that the devices may hold unfinished


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Normalise uint8 pixels [..., C] to float32 (x / 255 - mean) / std."""
    unit = jnp.asarray(images, jnp.float32) / 255.0

    def per_channel(values: Sequence[float]) -> Array:
        return jax.lax.broadcast_to_rank(jnp.asarray(values, unit.dtype), unit.ndim)

    return (unit - per_channel(mean)) / per_channel(std)


def to_pixels(
    images: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Invert `normalise`: return the nearest uint8 pixels, clipped to [0, 255]."""
    unit = images * np.asarray(std) + np.asarray(mean)
    return np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)


class Evaluator:
    """The evaluator of one network, compiled once, on one evaluation set.

    Args:
      apply: (variables, normalised images) -> logits.
      eval_set: the images and labels.
      mean: per-channel mean of P's normalisation, for pixels in [0, 1].
      std: per-channel standard deviation, likewise.
      batch_size: of the global batch; it is rounded up to a multiple of the number of
        devices.
      devices: local devices.
      reference: another network, (variables, normalised images) -> logits, whose
        classes take the place of the labels; None takes the labels.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        eval_set: evaluation.AnySet,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        devices: Sequence[jax.Device],
        reference: Callable[..., Any] | None = None,
    ):
        def count(variables, images, labels, mask):
            normalised = normalise(images, mean, std)
            logits = apply(variables, normalised)
            if reference is not None:
                labels = jnp.argmax(reference(variables, normalised), -1)
            right = jnp.argmax(logits, -1) == labels
            return jnp.sum(jnp.where(right, mask, 0)), jnp.sum(mask)

        self._eval_set = eval_set
        self._batch_size = -(-batch_size // len(devices)) * len(devices)
        self._count = sharding.parallel_count(count, devices)

    def top1(self, variables: Any) -> float:
        """Measure the top-1 accuracy in per cent over the whole set."""
        counts: list[Any] = []
        batches = evaluation.batches(self._eval_set, self._batch_size)
        # All processes stop together if one of them cannot read an image.
        while batch := multihost.together(functools.partial(next, batches, None)):
            counts.append(self._count(variables, *batch))
            # The next batch is decoded meanwhile; more batches would fill the memory.
            jax.block_until_ready(counts[-_MOST_PENDING:][0])
        correct, total = np.asarray(sharding.fetch(counts), np.float64).sum(0)
        return float(100 * correct / total)
