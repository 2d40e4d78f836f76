"""Whether an exported file computes what Q does: image by image, on another runtime.

On an evaluation set the top-1 of the two may differ by `TOP1_POINTS`; on less than
`LARGE` images, by twice the standard error of the difference more. Without one, images
are G's, or random where there is no G either; then the share of equal classes must
reach `SAME_CLASS`, the mean difference of the logits stay below `LOGIT_SHARE` of their
spread. Equality to the last bit is not to be had: two runtimes sum in another order,
and an activation on the edge of two codes then takes the other one.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import onnxruntime

from adadfq_jax import data
from adadfq_jax.errors import ExportError

TOP1_POINTS = 0.1
SAME_CLASS = 0.99
LOGIT_SHARE = 0.05
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


def evaluation_images(eval_set: data.AnySet, name: str) -> Images:
    """A whole evaluation set in memory; the first `SAMPLE` images of a streamed one."""
    if isinstance(eval_set, data.StreamedSet):
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


def compare(ours: np.ndarray, theirs: np.ndarray, images: Images) -> dict[str, Any]:
    """How far two runtimes' logits [N, classes] are apart, as JSON values.

    `top1_error` is the standard error of the difference of the top-1 by the choice of
    the images, from those on which one of the two is right; 0 of `LARGE` sets.
    """
    difference = np.abs(ours - theirs)
    found: dict[str, Any] = {
        "images": len(ours),
        "images_of": images.name,
        "same_class": float(np.mean(ours.argmax(-1) == theirs.argmax(-1))),
        "logit_difference_max": float(difference.max()),
        "logit_difference_mean": float(difference.mean()),
        "logit_spread": float(ours.std()),
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
    if found["top1"] is not None:
        within = TOP1_POINTS + 2 * found["top1_error"] + 1e-9
        holds = abs(found["top1"] - found["q_top1"]) <= within
        what = f"top-1 {found['top1']:.2f} % instead of {found['q_top1']:.2f} %"
    else:
        mean, spread = found["logit_difference_mean"], found["logit_spread"]
        holds = found["same_class"] >= SAME_CLASS and mean <= LOGIT_SHARE * spread
        what = (
            f"{100 * found['same_class']:.1f} % of the classes are Q's, logits are"
            f" {mean:.3g} off (spread {spread:.3g})"
        )
    if not holds:  # of NaN too
        raise ExportError(
            f"{file}: it does not compute what Q does: on {found['images']:,} of"
            f" {found['images_of']}, {what}; it was not written"
        )
