"""Evaluation sets: held in memory, or decoded when they are read."""

import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adadfq_jax.errors import InputError


class Batch(NamedTuple):
    """A full-sized batch.

    Attributes:
      images: uint8 [B, H, W, C].
      labels: int32 [B].
      mask: float32 [B], 0 for the rows that pad the last batch, else 1.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def _padded(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Batch:
    padding = batch_size - len(labels)
    mask = np.ones(batch_size, np.float32)
    if padding:
        images = np.pad(images, [(0, padding)] + [(0, 0)] * 3)
        labels = np.pad(labels, (0, padding))
        mask[-padding:] = 0
    return Batch(images, labels, mask)


class EvalSet(NamedTuple):
    """Images uint8 [N, H, W, C] and their labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.labels)

    def first(self, count: int) -> "EvalSet":
        """Return the first `count` images, or all if there are fewer."""
        return EvalSet(self.images[:count], self.labels[:count])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield all images in equal batches; the last one is padded and masked."""
        for start in range(0, self.size, batch_size):
            end = start + batch_size
            yield _padded(self.images[start:end], self.labels[start:end], batch_size)


class Encoded(NamedTuple):
    """An image as it is stored.

    Attributes:
      name: of the image, for messages.
      label: its class, from 0.
      content: content of the file, or its path.
    """

    name: str
    label: int
    content: bytes | Path


class StreamedSet:
    """Images that threads decode before a batch needs them.

    At any time, a few batches are in memory.

    Args:
      size: number of images.
      rows: makes an iterator over all images, in the same order on every call.
      decode: decodes an image to pixels uint8 [H, W, C]; it is called in threads.
      description: of the set, for messages.
    """

    def __init__(
        self,
        size: int,
        rows: Callable[[], Iterable[Encoded]],
        decode: Callable[[Encoded], np.ndarray],
        description: str,
    ):
        self.size, self.description = size, description
        self._rows, self._decode = rows, decode

    def first(self, count: int) -> EvalSet:
        """Load the first `count` images into memory, or all if there are fewer.

        Raises:
          InputError: an image cannot be decoded.
        """
        with contextlib.closing(self._decoded(count)) as images:
            return _stacked(itertools.islice(images, count))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield all images in order, in equal batches; the last is padded and masked.

        Raises:
          InputError: an image cannot be decoded.
        """
        count = 0
        with contextlib.closing(self._decoded(2 * batch_size)) as images:
            while rows := list(itertools.islice(images, batch_size)):
                count += len(rows)
                yield _padded(*_stacked(rows), batch_size)
        if count != self.size:
            raise InputError(
                f"{self.description}: {count:,} images were read instead of"
                f" {self.size:,}"
            )

    def _decoded(self, ahead: int) -> Generator[tuple[np.ndarray, int], None, None]:
        """Yield pixels and labels in order, with `ahead` images decoding."""
        pending: collections.deque[tuple[Future[np.ndarray], int]] = collections.deque()
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

        def take() -> tuple[np.ndarray, int]:
            image, label = pending.popleft()
            return image.result(), label

        try:
            for row in self._rows():
                pending.append((pool.submit(self._decode, row), row.label))
                if len(pending) > ahead:
                    yield take()
            while pending:
                yield take()
        finally:
            pool.shutdown(cancel_futures=True)


def _stacked(rows: Iterable[tuple[np.ndarray, int]]) -> EvalSet:
    images, labels = zip(*rows, strict=True)
    return EvalSet(np.stack(images), np.asarray(labels, np.int32))


AnySet = EvalSet | StreamedSet
