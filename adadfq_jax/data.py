"""Evaluation sets. The only importer of TFDS; training never comes here."""

import importlib.util
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
      dataset: TFDS name, prepared as array_record, or as tfrecord, which TFDS reads
        where TensorFlow is installed.
      data_dir: TFDS folder; '' is its default.
      split: e.g. 'test'.

    Raises:
      InputError: TFDS is not installed, or the data is not prepared or not readable.
    """
    if not dataset:
        raise InputError(
            "config.eval.dataset='': name a TFDS set, or run with"
            " config.eval.enabled=False"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            "evaluation needs tensorflow-datasets (pip install -r requirements.txt),"
            " or config.eval.enabled=False"
        ) from error
    where = data_dir or str(tfds.core.constants.DATA_DIR)
    # TFDS raises a dozen types for what it does not find or cannot read.
    try:
        builder = tfds.builder(dataset, data_dir=where)
    except Exception as error:
        raise InputError(
            f"config.eval.dataset={dataset!r}: TFDS knows no such set, nor is there one"
            f" in {where} ({_first_line(error)})"
        ) from error
    if not builder.data_path.exists():
        raise InputError(
            f"evaluation data {dataset!r} is not in {where} (config.eval.data_dir);"
            f" prepare it, once and where tensorflow is installed, with"
            f" {_preparation(dataset, where)}, or run with config.eval.enabled=False"
        )
    if builder.info.file_format is tfds.core.FileFormat.TFRECORD:
        if not _is_installed("tensorflow"):
            raise InputError(
                f"evaluation data {dataset!r} in {where} is in tfrecord form, which"
                " needs TensorFlow to be read: pip install tensorflow, or prepare it"
                " anew, where tensorflow is installed, with"
                f" {_preparation(dataset, 'DIR')} and name DIR in config.eval.data_dir,"
                " or run with config.eval.enabled=False"
            )
        read = _read_tfrecord
    else:
        read = _read_random_access
    try:
        rows = read(builder, split)
        images = np.stack([row["image"] for row in rows])
        return EvalSet(images, np.asarray([row["label"] for row in rows], np.int32))
    except Exception as error:
        raise InputError(
            f"evaluation data {dataset!r} in {where}, split {split!r}, cannot be read;"
            " it must have rows of an 'image', all of one size, and a 'label'"
            f" ({_first_line(error)})"
        ) from error


def _read_random_access(builder, split: str) -> list[dict]:
    source = builder.as_data_source(split=split)
    return source.__getitems__(range(len(source)))


def _read_tfrecord(builder, split: str) -> list[dict]:
    import tensorflow_datasets as tfds

    return list(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))


def _preparation(dataset: str, where: str) -> str:
    """The command that prepares a set in a form that TensorFlow is not needed for."""
    code = (
        "import tensorflow_datasets as tfds;"
        f" tfds.builder('{dataset}', data_dir='{where}', file_format='array_record')"
        ".download_and_prepare()"
    )
    return f'`python -c "{code}"`'


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


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
