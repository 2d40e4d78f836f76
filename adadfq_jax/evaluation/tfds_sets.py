"""Classification sets prepared by TFDS. No other module imports TFDS."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from adadfq_jax.errors import InputError, first_line
from adadfq_jax.evaluation.decoding import Decoding
from adadfq_jax.evaluation.sets import Encoded, EvalSet, StreamedSet
from adadfq_jax.runtime import extras


class _Prepared(NamedTuple):
    """A prepared set.

    Attributes:
      builder: the set's TFDS builder.
      dataset: the set's TFDS name.
      where: the TFDS folder.
    """

    builder: Any
    dataset: str
    where: str


def load(dataset: str, data_dir: str, split: str) -> EvalSet:
    """Load a prepared TFDS classification set into memory; all images have one size.

    Args:
      dataset: TFDS name of a set that was prepared as array_record, or as tfrecord,
        which TFDS reads only where TensorFlow is installed.
      data_dir: TFDS folder; '' means TFDS's default.
      split: e.g. 'test'.

    Raises:
      InputError: TFDS is not installed, or the data is not prepared or not readable.
    """
    prepared = _prepared(dataset, data_dir)
    try:
        rows = list(_rows(prepared, split, None))
        images = np.stack([row["image"] for row in rows])
        return EvalSet(images, np.asarray([row["label"] for row in rows], np.int32))
    except Exception as error:
        raise _unreadable(prepared, split, "all of one size", error) from error


def stream(
    dataset: str, data_dir: str, split: str, num_classes: int, decoding: Decoding
) -> StreamedSet:
    """Open a prepared TFDS classification set whose images are decoded when read.

    Args:
      dataset: see `load`.
      data_dir: see `load`.
      split: see `load`.
      num_classes: of P.
      decoding: decodes an image's file to pixels.

    Raises:
      InputError: see `load`, or the set has another number of classes.
    """
    prepared = _prepared(dataset, data_dir)
    try:
        import tensorflow_datasets as tfds

        size = prepared.builder.info.splits[split].num_examples
        classes = prepared.builder.info.features["label"].num_classes
        decoders = {"image": tfds.decode.SkipDecoding()}
        stored = _rows(prepared, split, decoders)
    except Exception as error:
        raise _unreadable(prepared, split, "as files", error) from error
    if classes != num_classes:
        raise InputError(
            f"evaluation data {dataset!r} in {prepared.where} has {classes:,} classes,"
            f" the network has {num_classes:,}"
        )

    def rows():
        try:
            for number, row in enumerate(stored):
                name = f"{dataset} {split} in {prepared.where}, image {number}"
                yield Encoded(name, int(row["label"]), bytes(row["image"]))
        except Exception as error:
            raise _unreadable(prepared, split, "as files", error) from error

    description = f"{dataset} {split} in {prepared.where}: {size:,} images"
    return StreamedSet(size, rows, decoding, description)


def _prepared(dataset: str, data_dir: str) -> _Prepared:
    if not dataset:
        raise InputError(
            "eval.dataset='': name a TFDS set, or 'folder' and the folder in"
            " eval.data_dir, or run with eval.enabled=False"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise extras.missing(
            "evaluation", "tensorflow-datasets", "eval", "or eval.enabled=False"
        ) from error
    where = data_dir or str(tfds.core.constants.DATA_DIR)
    # TFDS raises a dozen types of errors for sets that it cannot find or read.
    try:
        builder = tfds.builder(dataset, data_dir=where)
    except Exception as error:
        raise InputError(
            f"eval.dataset={dataset!r}: TFDS knows no such set, and there is none"
            f" in {where} ({first_line(error)})"
        ) from error
    if not builder.data_path.exists():
        raise InputError(
            f"evaluation data {dataset!r} is not in {where} (eval.data_dir);"
            f" prepare it once, where tensorflow is installed, with"
            f" {_preparation(dataset, where)}, or run with eval.enabled=False"
        )
    prepared = _Prepared(builder, dataset, where)
    if _is_tfrecord(prepared) and not extras.are_installed("tensorflow"):
        raise InputError(
            f"evaluation data {dataset!r} in {where} is in tfrecord form, which"
            " only TensorFlow reads: pip install tensorflow, or prepare the data"
            " anew, where tensorflow is installed, with"
            f" {_preparation(dataset, 'DIR')} and name DIR in eval.data_dir,"
            " or run with eval.enabled=False"
        )
    return prepared


def _is_tfrecord(prepared: _Prepared) -> bool:
    import tensorflow_datasets as tfds

    return prepared.builder.info.file_format is tfds.core.FileFormat.TFRECORD


def _rows(prepared: _Prepared, split: str, decoders: Any) -> Iterable[dict]:
    """Return the rows of a split in order; they can be iterated over repeatedly.

    Args:
      prepared: the set.
      split: name of the set's split.
      decoders: TFDS decoders by feature, or None.
    """
    import tensorflow_datasets as tfds

    builder = prepared.builder
    if _is_tfrecord(prepared):
        return tfds.as_numpy(
            builder.as_dataset(split=split, shuffle_files=False, decoders=decoders)
        )
    return _RandomAccess(builder.as_data_source(split=split, decoders=decoders))


class _RandomAccess:
    """A TFDS data source as an iterable, which reads many rows at once."""

    AT_ONCE = 32

    def __init__(self, source: Any):
        self._source = source

    def __iter__(self):
        places: Sequence[int] = range(len(self._source))
        for start in range(0, len(places), self.AT_ONCE):
            yield from self._source.__getitems__(places[start : start + self.AT_ONCE])


def _unreadable(
    prepared: _Prepared, split: str, images: str, error: Exception
) -> InputError:
    return InputError(
        f"evaluation data {prepared.dataset!r} in {prepared.where}, split {split!r},"
        f" cannot be read; it must have rows of an 'image', {images}, and a 'label'"
        f" ({first_line(error)})"
    )


def _preparation(dataset: str, where: str) -> str:
    """Return the command that prepares a set in a form that needs no TensorFlow."""
    code = (
        "import tensorflow_datasets as tfds;"
        f" tfds.builder('{dataset}', data_dir='{where}', file_format='array_record')"
        ".download_and_prepare()"
    )
    return f'`python -c "{code}"`'
