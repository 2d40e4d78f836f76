"""Evaluation sets: from TFDS or from a folder of images. Training never comes here.

Small ones are arrays in memory; images that are resized, and folders, are decoded in
threads when a batch needs them.
"""

from collections.abc import Iterator

from adadfq_jax.evaluation.decoding import Decoding
from adadfq_jax.evaluation.image_folder import stream_folder
from adadfq_jax.evaluation.loading import load_eval_set
from adadfq_jax.evaluation.sets import AnySet, Batch, EvalSet, StreamedSet
from adadfq_jax.evaluation.tfds_sets import load, stream

__all__ = [
    "AnySet",
    "Batch",
    "Decoding",
    "EvalSet",
    "StreamedSet",
    "batches",
    "load",
    "load_eval_set",
    "stream",
    "stream_folder",
]


def batches(eval_set: AnySet, batch_size: int) -> Iterator[Batch]:
    """All images in order, in equal batches; the last is padded and masked."""
    return eval_set.batches(batch_size)
