"""Evaluation sets. The only importer of TFDS; training never comes here."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from adadfq_jax.errors import InputError


class EvalSet(NamedTuple):
    """Images uint8 [N, H, W, C] and their labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray


class Batch(NamedTuple):
    """A full-sized batch; mask is 0 for the rows that only pad the last one."""

    images: np.ndarray  # uint8 [B, H, W, C]
    labels: np.ndarray  # int32 [B]
    mask: np.ndarray  # float32 [B]


def load(dataset: str, data_dir: str, split: str) -> EvalSet:
    """A prepared TFDS classification set, decoded into memory.

    Args:
      dataset: TFDS name, prepared as array_record.
      data_dir: TFDS folder; '' is its default.
      split: e.g. 'test'.

    Raises:
      InputError: TFDS is not installed or the data is not prepared.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            "evaluation needs tensorflow-datasets (pip install -r requirements.txt),"
            " or config.eval.enabled=False"
        ) from error
    try:
        source = tfds.data_source(
            dataset, split=split, data_dir=data_dir or None, download=False
        )
    except Exception as error:  # TFDS raises a dozen types for "not there"
        raise InputError(
            f"evaluation data {dataset!r}, split {split!r} cannot be read from"
            f" {data_dir or 'the TFDS folder'} ({_first_line(error)}); prepare it as"
            " array_record, name its folder in config.eval.data_dir, or run with"
            " config.eval.enabled=False"
        ) from error
    try:
        rows = source.__getitems__(range(len(source)))
        images = np.stack([row["image"] for row in rows])
        return EvalSet(images, np.asarray([row["label"] for row in rows], np.int32))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"evaluation data {dataset!r}, split {split!r} must have rows of an"
            f" 'image', all of one size, and a 'label' ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def batches(eval_set: EvalSet, batch_size: int) -> Iterator[Batch]:
    """All images in order, in equal batches; the last is padded and masked."""
    for start in range(0, len(eval_set.labels), batch_size):
        images = eval_set.images[start : start + batch_size]
        labels = eval_set.labels[start : start + batch_size]
        padding = batch_size - len(labels)
        mask = np.ones(batch_size, np.float32)
        if padding:
            images = np.pad(images, [(0, padding)] + [(0, 0)] * 3)
            labels = np.pad(labels, (0, padding))
            mask[-padding:] = 0
        yield Batch(images, labels, mask)
