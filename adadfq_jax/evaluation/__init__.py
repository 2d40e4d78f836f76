"""Evaluation sets from TFDS or from a folder of images. Training does not use them.

A set without resizing is held in memory as arrays. Images of folders and images that
are resized are decoded in threads when a batch needs them.
"""

from collections.abc import Iterator

from adadfq_jax.evaluation.decoding import Decoding
from adadfq_jax.evaluation.image_folder import stream_folder
from adadfq_jax.evaluation.loading import (
    is_unlabelled,
    load_eval_set,
    load_unlabelled,
)
from adadfq_jax.evaluation.sets import AnySet, Batch, EvalSet, StreamedSet
from adadfq_jax.evaluation.tfds_sets import load, stream

__all__ = [
    "AnySet",
    "Batch",
    "Decoding",
    "EvalSet",
    "StreamedSet",
    "batches",
    "is_unlabelled",
    "load",
    "load_eval_set",
    "load_unlabelled",
    "stream",
    "stream_folder",
]


def batches(eval_set: AnySet, batch_size: int) -> Iterator[Batch]:
    """Yield all images in order, in equal batches; the last is padded and masked."""
    return eval_set.batches(batch_size)
