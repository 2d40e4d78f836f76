"""Whether an exported file computes what Q does: image by image, on another runtime.

Equality to the last bit is not to be had: two runtimes sum in another order, and an
activation on the edge of two codes then takes the other one. In a deep network that
spreads: at few bits on some of the images, until their logits are as of another image,
at 8 bits a little on all. How much a network does so by itself is measured, by moving
its constants by `JITTER`: `own_differences`. On every set

- the largest error of an image's logits, in the median over the images, is at most
  `LOGIT_SHARE` of a logit's spread from image to image and `OWN` times Q's own, but in
  no case more than that spread, where an image could not be told from another;
- the mean error is at most `LOGIT_SHARE` of the spread of all logits;
- the class is another on at most 1 - `SAME_CLASS` of the images, `OWN` times Q's own
  share and two standard errors. Where the margin of Q's class over the next is within
  `LOGIT_SHARE` of the spread for each of the two, a change does not count.

With labels, top-1 may differ by `TOP1_POINTS` besides; on less than `LARGE` images by
two standard errors of the difference more. Images are an evaluation set's; without one
they are G's, or random where there is no G either.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import evaluation
from adadfq_jax.deploy.network import QuantizedNetwork
from adadfq_jax.errors import ExportError
from adadfq_jax.game import QVariables

TOP1_POINTS = 0.1
SAME_CLASS = 0.99
LOGIT_SHARE = 0.05
JITTER = 2.0**-22  # relative: two steps of float32, as of a sum in another order
OWN = 2  # the runtimes' two roundings against one jitter
BATCH_SIZE = 250
UNLABELLED_IMAGES = 250
LARGE = 10_000  # images of a set on which 0.1 point is more than chance
SAMPLE = 1000  # of a set that is decoded as it is needed
LATENCY_BATCHES = {1: 30, 64: 5}  # images at once -> times that it is repeated

RANDOM = "random images"

Run = Callable[[np.ndarray], np.ndarray]  # images [B, H, W, C] -> logits


class Images(NamedTuple):
    """What the runtimes are compared on.

    pixels: uint8 [N, H, W, C]. labels: int32 [N], or None of images that have none.
    name: of the set.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    name: str


def evaluation_images(eval_set: evaluation.AnySet, name: str) -> Images:
    """A whole evaluation set in memory; the first `SAMPLE` images of a streamed one."""
    if isinstance(eval_set, evaluation.StreamedSet):
        eval_set = eval_set.first(SAMPLE)
    return Images(eval_set.images, eval_set.labels, name)


def random_images(shape: tuple[int, ...]) -> Images:
    """Patches and noise, the same every time; shape is (H, W, channels)."""
    height, width, channels = shape
    rng = np.random.default_rng(0)
    coarse = (UNLABELLED_IMAGES, -(-height // 4), -(-width // 4), channels)
    patches = rng.integers(0, 192, coarse).repeat(4, 1).repeat(4, 2)
    noise = rng.integers(0, 64, (UNLABELLED_IMAGES, height, width, channels))
    pixels = (patches[:, :height, :width] + noise).astype(np.uint8)
    return Images(pixels, None, RANDOM)


def onnx_runner(model: bytes, to_input: Callable[[np.ndarray], np.ndarray]) -> Run:
    """An ONNX model on ONNX Runtime's CPU provider, as others would start it.

    Args:
      model: the file's content.
      to_input: images [B, H, W, C] -> what the model takes.
    """
    import onnxruntime  # of an extra of the package

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {"images": to_input(images)})[0]

    return run


def stablehlo_runner(program: bytes) -> Run:
    """A program of `to_stablehlo`, read back, on this machine's CPU."""
    call = jax.jit(jax.export.deserialize(bytearray(program)).call)
    cpu = jax.local_devices(backend="cpu")[0]

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(call(jax.device_put(images, cpu)))

    return run


def all_logits(run: Run, images: np.ndarray) -> np.ndarray:
    """Logits [N, classes] of many images, in batches."""
    starts = range(0, len(images), BATCH_SIZE)
    return np.concatenate([run(images[i : i + BATCH_SIZE]) for i in starts])


def latency_ms(run: Run, images: np.ndarray) -> dict[str, float]:
    """Median milliseconds of a call, by the number of images at once."""
    found = {}
    for count, repeats in LATENCY_BATCHES.items():
        batch, seconds = np.resize(images, (count, *images.shape[1:])), []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            run(batch)
            seconds.append(time.perf_counter() - started)
        found[str(count)] = round(1000 * statistics.median(seconds[1:]), 3)
    return found


class Differences(NamedTuple):
    """Of two runtimes' logits.

    median: over the images, of an image's largest. mean: of all. changed: the share of
    images whose class is another, where Q's margin is beyond noise.
    """

    median: float = 0.0
    mean: float = 0.0
    changed: float = 0.0


def differences(ours: np.ndarray, theirs: np.ndarray) -> Differences:
    """Of logits [N, classes], the first being Q's."""
    errors = np.abs(ours - theirs)
    second, first = np.sort(ours, -1)[:, -2:].T
    beyond = first - second > 2 * LOGIT_SHARE * _spread(ours)
    changed = beyond & (ours.argmax(-1) != theirs.argmax(-1))
    median, mean = np.median(errors.max(-1)), errors.mean()
    return Differences(float(median), float(mean), float(changed.mean()))


def own_differences(
    network: QuantizedNetwork, images: np.ndarray, ours: np.ndarray
) -> Differences:
    """Those of Q to itself where its kernels and batch norms move by `JITTER`.

    Args:
      network: Q; its ranges stay.
      images: in normalised space; the first `UNLABELLED_IMAGES` are taken.
      ours: Q's logits of them.
    """
    rng = np.random.default_rng(0)

    def move(leaf: np.ndarray) -> np.ndarray:
        if np.asarray(leaf).dtype.kind != "f":  # an index, a mask
            return leaf
        factor = 1 + JITTER * rng.normal(size=np.shape(leaf))
        return np.asarray(leaf * factor, np.float32)

    others, kernels, ranges = network.variables
    others, kernels = jax.tree.map(move, (others, kernels))
    own = QVariables(others, kernels, ranges)
    moved = dataclasses.replace(network, variables=own)
    images = images[:UNLABELLED_IMAGES]
    theirs = all_logits(lambda batch: np.asarray(moved(jnp.asarray(batch))), images)
    return differences(ours[: len(images)], theirs)


def _spread(logits: np.ndarray) -> float:
    """The standard deviation of a logit from image to image."""
    return float(logits.std(0).mean())


def compare(
    ours: np.ndarray, theirs: np.ndarray, images: Images, own: Differences
) -> dict[str, Any]:
    """How far two runtimes' logits [N, classes] are apart, as JSON values.

    `top1_error` is the standard error of the difference of the top-1 by the choice of
    the images, from those on which one of the two is right; 0 of `LARGE` sets.

    Args:
      ours: Q's.
      theirs: of a file.
      images: that they are of.
      own: from `own_differences`.
    """
    apart = differences(ours, theirs)
    found: dict[str, Any] = {
        "images": len(ours),
        "images_of": images.name,
        "same_class": float(np.mean(ours.argmax(-1) == theirs.argmax(-1))),
        "changed_class": apart.changed,
        "logit_difference_max": float(np.abs(ours - theirs).max()),
        "logit_difference_mean": apart.mean,
        "logit_difference_median": apart.median,
        "own_differences": own._asdict(),
        "logit_spread": float(ours.std()),
        "logit_spread_images": _spread(ours),
        "q_top1": None,
        "top1": None,
        "top1_error": 0.0,
    }
    if images.labels is not None:
        right = [logits.argmax(-1) == images.labels for logits in (ours, theirs)]
        found["q_top1"], found["top1"] = (float(100 * np.mean(r)) for r in right)
        if len(ours) < LARGE:
            changed = np.mean(right[0] != right[1])
            found["top1_error"] = float(100 * np.sqrt(changed / len(ours)))
    return found


def require_agreement(file: str, found: dict[str, Any]) -> None:
    """Refuses a file that does not compute what Q does.

    Args:
      file: its name, for the message.
      found: from `compare`.

    Raises:
      ExportError: with the numbers.
    """
    median, mean, spread, of_images = (
        found[f"logit_{key}"]
        for key in ("difference_median", "difference_mean", "spread", "spread_images")
    )
    own = Differences(**found["own_differences"])
    rounding = 1e-5 * spread  # where the logits hardly depend on the image
    largest = min(LOGIT_SHARE * of_images + OWN * own.median, of_images) + rounding
    changes = 1 - SAME_CLASS + OWN * own.changed
    changes += 2 * (changes / found["images"]) ** 0.5
    holds = (
        median <= largest
        and mean <= LOGIT_SHARE * spread
        and found["changed_class"] <= changes
    )
    what = (
        f"{100 * found['same_class']:.1f} % of the classes are Q's, logits are"
        f" {mean:.3g} off in the mean, an image's by {median:.3g} (spread {spread:.3g},"
        f" from image to image {of_images:.3g})"
    )
    if found["top1"] is not None:
        within = TOP1_POINTS + 2 * found["top1_error"] + 1e-9
        holds = holds and abs(found["top1"] - found["q_top1"]) <= within
        what = f"top-1 {found['top1']:.2f} % instead of {found['q_top1']:.2f} %, {what}"
    if not holds:  # of NaN too
        raise ExportError(
            f"{file}: it does not compute what Q does: on {found['images']:,} of"
            f" {found['images_of']}, {what}; it was not written"
        )
