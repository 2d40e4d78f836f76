"""Check of exported files: each must compute what Q does, on another runtime.

Two runtimes do not agree to the last bit. They sum in different orders, and an
activation on the edge between two codes may then get the other code. In a deep network
such differences spread: with few bits, some images get quite different logits; with 8
bits, the logits of all images change a little. `own_differences` measures how much Q
differs from itself when its constants are moved by `JITTER`. On every set of images:

- The largest error of an image's logits, as the median over the images, is at most
  `LOGIT_SHARE` of a logit's spread from image to image plus `OWN` times Q's own
  difference. It is at most that spread, beyond which one image could pass for another.
- The mean error is at most `LOGIT_SHARE` of the spread of all logits.
- The class changes on at most a share 1 - `SAME_CLASS` of the images, plus `OWN` times
  Q's own share, plus two standard errors. A change counts only where the margin of Q's
  class over the next one is more than twice `LOGIT_SHARE` of the spread.

With labels, top-1 may differ by at most `TOP1_POINTS`, and on fewer than `LARGE` images
by two standard errors of the difference more. The images come from an evaluation set;
without one they come from G, or are random where there is no G either.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import evaluation
from adadfq_jax.deploy.network import QuantizedNetwork
from adadfq_jax.errors import ExportError, InputError, first_line
from adadfq_jax.game import QVariables

TOP1_POINTS = 0.1
SAME_CLASS = 0.99
LOGIT_SHARE = 0.05
JITTER = 2.0**-22  # relative: two float32 steps, as when a sum changes its order
OWN = 2  # each of the two runtimes rounds, the jitter is applied once
BATCH_SIZE = 50  # larger ones are slower on CPU
UNLABELLED_IMAGES = 250
LARGE = 10_000  # images of a set on which 0.1 point is more than chance
SAMPLE = 1000  # images that show whether a file computes what Q does
LATENCY_BATCHES = {1: 30, 64: 5}  # batch size -> number of repetitions

RANDOM = "random images"

Run = Callable[[np.ndarray], np.ndarray]  # images [B, H, W, C] -> logits


class Images(NamedTuple):
    """Images on which the runtimes are compared.

    Attributes:
      pixels: uint8 [N, H, W, C].
      labels: int32 [N], or None where the images have no labels.
      name: of the set.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    name: str

    def first(self, count: int) -> "Images":
        """Return the first `count` images, or all if there are fewer."""
        labels = None if self.labels is None else self.labels[:count]
        return Images(self.pixels[:count], labels, self.name)


def evaluation_images(eval_set: evaluation.AnySet, name: str) -> Images:
    """Take all images of a set in memory, or the first `SAMPLE` of a streamed set."""
    if isinstance(eval_set, evaluation.StreamedSet):
        eval_set = eval_set.first(SAMPLE)
    return Images(eval_set.images, eval_set.labels, name)


def random_images(shape: tuple[int, ...]) -> Images:
    """Make random patches with noise, always the same; shape is (H, W, channels)."""
    height, width, channels = shape
    rng = np.random.default_rng(0)
    coarse = (UNLABELLED_IMAGES, -(-height // 4), -(-width // 4), channels)
    patches = rng.integers(0, 192, coarse).repeat(4, 1).repeat(4, 2)
    noise = rng.integers(0, 64, (UNLABELLED_IMAGES, height, width, channels))
    pixels = (patches[:, :height, :width] + noise).astype(np.uint8)
    return Images(pixels, None, RANDOM)


def onnx_runner(
    model: bytes,
    to_input: Callable[[np.ndarray], np.ndarray],
    *,
    optimized: bool = True,
) -> Run:
    """Start an ONNX model on ONNX Runtime's CPU provider.

    Args:
      model: the file's content.
      to_input: converts images [B, H, W, C] to the model's input.
      optimized: whether ONNX Runtime fuses operators; otherwise quantized tensors are
        computed in float, as the file says.

    Raises:
      ExportError: ONNX Runtime does not load the model. The runner raises it where
        ONNX Runtime does not compute it.
    """
    import onnxruntime  # here: it is an optional extra

    options = onnxruntime.SessionOptions()
    # Without VNNI, sums of products of kernels that use all 8 bits overflow otherwise.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    with export_errors():
        session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )

    def run(images: np.ndarray) -> np.ndarray:
        given = {"images": to_input(images)}
        with export_errors():
            return session.run(None, given)[0]

    return run


@contextlib.contextmanager
def export_errors() -> Iterator[None]:
    """Raise ExportError in place of ONNX Runtime's own errors."""
    try:
        yield
    except Exception as error:  # its errors have no class in common
        said = first_line(error)
        message = f"ONNX Runtime does not execute the network ({said})"
        raise ExportError(message) from error


def stablehlo_runner(program: bytes) -> Run:
    """Read a program of `to_stablehlo` back, to run on this machine's CPU."""
    call = jax.jit(jax.export.deserialize(bytearray(program)).call)
    cpu = jax.local_devices(backend="cpu")[0]

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(call(jax.device_put(images, cpu)))

    return run


def litert_runner(content: bytes) -> Run:
    """Start a .tflite file on LiteRT's CPU kernels, image by image.

    Raises:
      InputError: LiteRT does not execute one of its operators.
    """
    from ai_edge_litert.interpreter import Interpreter  # here: an optional extra

    def run(images: np.ndarray) -> np.ndarray:
        return np.concatenate([call(images=image[None])["logits"] for image in images])

    try:
        interpreter = Interpreter(model_content=content)
        interpreter.allocate_tensors()
        call = interpreter.get_signature_runner()
        (entry,) = call.get_input_details().values()
        run(np.zeros(entry["shape"], entry["dtype"]))
    except (RuntimeError, ValueError) as error:
        said = first_line(error)
        raise InputError(f"LiteRT does not execute the network ({said})") from error
    return run


def all_logits(run: Run, images: np.ndarray) -> np.ndarray:
    """Compute the logits [N, classes] of many images, in batches."""
    starts = range(0, len(images), BATCH_SIZE)
    return np.concatenate([run(images[i : i + BATCH_SIZE]) for i in starts])


def latency_ms(run: Run, images: np.ndarray) -> dict[str, float]:
    """Measure the median milliseconds of a call, by batch size."""
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
    """Absolute differences of two runtimes' logits.

    Attributes:
      median: median over the images of an image's largest difference.
      mean: mean of all differences.
      changed: share of the images whose class changes although Q's margin is above the
        noise.
    """

    median: float = 0.0
    mean: float = 0.0
    changed: float = 0.0


def differences(ours: np.ndarray, theirs: np.ndarray) -> Differences:
    """Compare two arrays of logits [N, classes]; `ours` are Q's."""
    errors = np.abs(ours - theirs)
    second, first = np.sort(ours, -1)[:, -2:].T
    beyond = first - second > 2 * LOGIT_SHARE * _spread(ours)
    changed = beyond & (ours.argmax(-1) != theirs.argmax(-1))
    median, mean = np.median(errors.max(-1)), errors.mean()
    return Differences(float(median), float(mean), float(changed.mean()))


def own_differences(
    network: QuantizedNetwork, images: np.ndarray, ours: np.ndarray
) -> Differences:
    """Compare Q with itself after its float constants were moved by `JITTER`.

    Args:
      network: Q; its ranges are not moved.
      images: in normalised space; the first `UNLABELLED_IMAGES` are used.
      ours: Q's logits for the images.
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
    """Return a logit's standard deviation over the images, as the mean over logits."""
    return float(logits.std(0).mean())


def compare(
    ours: np.ndarray, theirs: np.ndarray, images: Images, own: Differences
) -> dict[str, Any]:
    """Compare two runtimes' logits [N, classes]; return the figures as JSON values.

    `top1_error` is the standard error of the difference in top-1 that comes from the
    choice of images. It is estimated from the images on which exactly one of the two is
    right, and is 0 for `LARGE` sets.

    Args:
      ours: Q's logits.
      theirs: an exported file's logits.
      images: the images that the logits belong to.
      own: result of `own_differences`.
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
    """Refuse a file that does not compute what Q does.

    Args:
      file: its name, for the message.
      found: result of `compare`.

    Raises:
      ExportError: the differences are too large; the message has the numbers.
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
        f"{100 * found['same_class']:.1f} % of the classes are Q's, the mean error of"
        f" the logits is {mean:.3g}, the median image's largest {median:.3g} (spread"
        f" {spread:.3g}, from image to image {of_images:.3g})"
    )
    if found["top1"] is not None:
        within = TOP1_POINTS + 2 * found["top1_error"] + 1e-9
        holds = holds and abs(found["top1"] - found["q_top1"]) <= within
        what = f"top-1 {found['top1']:.2f} % instead of {found['q_top1']:.2f} %, {what}"
    if not holds:  # also where a number is NaN
        raise ExportError(
            f"{file}: it does not compute what Q does: on {found['images']:,} of"
            f" {found['images_of']}, {what}; it was not written"
        )
