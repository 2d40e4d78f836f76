"""Recording during a game: P's and Q's classes and Q's layers at a few steps.

The recorder draws its own noise and labels, the same at every step. The game's draws
and its state are not changed.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax import game, losses, quant
from adadfq_jax.evaluation import AnySet
from adadfq_jax.evaluation.evaluator import normalise, to_pixels
from adadfq_jax.game import GameState, players
from adadfq_jax.models.convolution import convolve
from adadfq_jax.models.generator import LATENT_SIZE
from adadfq_jax.network import Graph, Hooks, kernels, run
from adadfq_jax.network.graph import Activation
from adadfq_jax.report import snapshot
from adadfq_jax.report.snapshot import Answers, Layers, Snapshot
from adadfq_jax.runtime import sharding

GENERATED = 256  # generated images, rounded up to whole batches
REAL = 512  # evaluation images at most, rounded down to whole batches
CLASSES_SHOWN = 10
EACH_SHOWN = 6  # images of a class
DISPUTED_SHOWN = 20  # images on which P and Q disagree
_MOST_VALUES = 2**16  # sampled from an activation
_STREAM = 2**31 - 3  # folded into the seed's key; no game has so many steps
_SPAN = snapshot.SPAN
_INSIDE = (_SPAN[0] + 1e-6, _SPAN[1] - 1e-6)


class Subject(NamedTuple):
    """The game to record, as plain values.

    Attributes:
      networks: the game's networks.
      options: quantize Q.
      num_classes: of P.
      seed: of the game.
      batch_size: of the game.
      mean: of P's normalisation.
      std: likewise.
      eval_set: evaluation images, or None.
    """

    networks: game.Networks
    options: game.QOptions
    num_classes: int
    seed: int
    batch_size: int
    mean: Sequence[float]
    std: Sequence[float]
    eval_set: AnySet | None


def classes_shown(num_classes: int) -> np.ndarray:
    """Choose at most `CLASSES_SHOWN` classes, evenly spaced."""
    count = min(num_classes, CLASSES_SHOWN)
    return np.unique(np.linspace(0, num_classes - 1, count).round().astype(int))


def labels_to_draw(num_classes: int, batch_size: int) -> np.ndarray:
    """Return int32 labels of whole batches, in a fixed random order.

    They include `EACH_SHOWN` labels of each shown class; the rest cycles over all
    classes.
    """
    shown = np.repeat(classes_shown(num_classes), EACH_SHOWN)
    total = math.ceil(max(GENERATED, len(shown)) / batch_size) * batch_size
    labels = np.concatenate([shown, np.arange(total - len(shown)) % num_classes])
    return np.random.default_rng(0).permutation(labels).astype(np.int32)


def choose_shown(
    labels: np.ndarray, p: np.ndarray, q: np.ndarray, num_classes: int
) -> np.ndarray:
    """Return indices of images to show: some of each shown class, and disputed ones.

    Args:
      labels: given to G, or true labels, [N].
      p: P's classes [N].
      q: Q's classes [N].
      num_classes: number of all classes.
    """
    classes = classes_shown(num_classes)
    of_classes = [np.flatnonzero(labels == c)[:EACH_SHOWN] for c in classes]
    disputed = np.flatnonzero(p != q)[:DISPUTED_SHOWN]
    return np.unique(np.concatenate([*of_classes, disputed]))


def _sample(x: Array) -> Array:
    """Sample about `_MOST_VALUES` values of x, evenly spaced, from all its channels."""
    stride = max(1, x.size // _MOST_VALUES)
    while math.gcd(stride, x.shape[-1]) > 1:
        stride += 1
    return x.reshape(-1)[::stride]


def _layers(rows: Sequence[tuple[str, Any, Any, Any, Any]]) -> Layers:
    """Make `Layers` from rows (name, values, quantized values, lo, hi)."""
    columns: list[list[Any]] = [[] for _ in Layers._fields]
    for name, x, quantized, lo, hi in rows:
        x = np.asarray(x, np.float64)
        signal, noise = np.sum(x**2), np.sum((quantized - x) ** 2)
        place = (x - lo) / np.maximum(hi - lo, 1e-8)
        counts, _ = np.histogram(np.clip(place, *_INSIDE), snapshot.BINS, _SPAN)
        sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.nan
        row = (name, np.min(lo), np.max(hi), sqnr, counts / x.size)
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    names, *numbers = columns
    return Layers(np.asarray(names, str), *(np.asarray(n, np.float32) for n in numbers))


def kernel_layers(
    state: GameState,
    teacher: game.Teacher,
    graph: Graph,
    quantized: Mapping[str, Array],
    options: game.QOptions,
) -> Layers:
    """Make `Layers` of Q's kernels.

    Args:
      state: has the Q to deploy, see `game.to_deploy`.
      teacher: P.
      graph: of Q.
      quantized: Q's quantized kernels by name.
      options: quantize Q.
    """
    own = kernels(graph, {**teacher.variables, **state.q_params})
    rows: list[Any] = []
    for entry in graph.kernels:
        kernel, ratio = own[entry.name], teacher.clip_ratios.get(entry.name)
        # A reconstruction learns its scales, beginning with this range.
        bits = options.bits_of_kernel(entry.name) if options.symmetric else None
        ends = quant.kernel_range(kernel, ratio, entry.out_axes, bits)
        name = entry.name.removesuffix(".kernel")
        rows.append((name, *sharding.fetch((kernel, quantized[entry.name], *ends))))
    return _layers(rows)


class Recorder:
    """The recorder of a game at some steps.

    Args:
      workdir: of the run.
      subject: the game to record.
      at: the steps; each is recorded at the first pause at or after it.
    """

    def __init__(self, workdir: Path, subject: Subject, at: Sequence[int]):
        self._workdir, self._subject, self._at = workdir, subject, at
        self._make = jax.jit(functools.partial(_make_images, subject))
        self._answer = jax.jit(functools.partial(_answer, subject))

    def resume(self, step: int) -> None:
        """Remove the recordings after `step`."""
        snapshot.drop_after(self._workdir, step)

    def is_due(self, step: int) -> bool:
        """Tell whether a step to record has been reached since the last recording."""
        last = max(snapshot.steps(self._workdir), default=-1)
        return any(last < at <= step for at in self._at)

    def record(
        self,
        step: int,
        state: GameState,
        teacher: game.Teacher,
        q: game.QVariables,
        p_top1: float | None,
        q_top1: float | None,
    ) -> None:
        """Record the players in their present state.

        Args:
          step: of the run.
          state: of the game.
          teacher: P.
          q: Q.
          p_top1: in per cent, None where there is no evaluation.
          q_top1: likewise, None where it was not measured at this step.
        """
        # All devices hold the same values, so that one device's copy is enough.
        state, teacher, q = jax.tree.map(
            lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x,
            (state, teacher, q),
        )
        state = game.to_deploy(state)
        subject = self._subject
        labels = labels_to_draw(subject.num_classes, subject.batch_size)
        batches = labels.reshape(-1, subject.batch_size)
        made = [self._make(state, i, batch) for i, batch in enumerate(batches)]
        collect = functools.partial(
            self._collect, functools.partial(self._answer, teacher, q)
        )
        generated, h, activations = collect(made, labels)
        real = real_activations = None
        if subject.eval_set is not None:
            real, _, real_activations = collect(*self._real_batches(subject.eval_set))
        snapshot.write(
            self._workdir,
            Snapshot(
                step=step,
                p_top1=math.nan if p_top1 is None else p_top1,
                q_top1=math.nan if q_top1 is None else q_top1,
                h=h,
                generated=generated,
                real=real,
                kernels=kernel_layers(
                    *(state, teacher, subject.networks.q, q.kernels, subject.options)
                ),
                activations=activations,
                real_activations=real_activations,
            ),
        )

    def _real_batches(self, eval_set: AnySet) -> tuple[list[np.ndarray], np.ndarray]:
        """Return normalised batches of evaluation images, and all their labels."""
        size = self._subject.batch_size
        count = min(REAL, eval_set.size)
        count -= count % size if count > size else 0
        found = eval_set.first(count)
        pixels = jnp.asarray(found.images)
        images = normalise(pixels, self._subject.mean, self._subject.std)
        batches = [np.asarray(images[i : i + size]) for i in range(0, count, size)]
        return batches, found.labels

    def _collect(
        self, answer: Callable[..., Any], batches: Sequence[Any], labels: np.ndarray
    ) -> tuple[Answers, np.ndarray, Layers]:
        """Collect answers and H' on all batches, and activations on the first batch."""
        answers = [answer(images) for images in batches]
        # Only the first batch's samples of activations leave the device.
        samples = sharding.fetch(answers[0][3])
        found = sharding.fetch([a[:3] for a in answers])
        p, q, h = (np.concatenate(part) for part in zip(*found, strict=True))
        shown = choose_shown(labels, p, q, self._subject.num_classes)
        images = np.concatenate(sharding.fetch(list(batches)))[shown]
        order = [entry.name for entry in self._subject.networks.q.activations]
        layers = _layers([(n, *samples[n]) for n in order if n in samples])
        pixels = to_pixels(images, self._subject.mean, self._subject.std)
        return Answers(labels, p, q, shown.astype(np.int32), pixels), h, layers


def _make_images(subject: Subject, state: GameState, number: int, labels: Array):
    """Generate a batch of images; G's batch norms use the batch, as in the game."""
    key = jax.random.fold_in(jax.random.key(subject.seed), _STREAM)
    key = jax.random.fold_in(key, number)
    latents = jax.random.normal(key, (subject.batch_size, LATENT_SIZE))
    variables = {"params": state.g_params, "batch_stats": state.g_batch_stats}
    images, _ = subject.networks.g_apply(
        variables, latents, labels, mutable=["batch_stats"]
    )
    return images


def _answer(subject: Subject, teacher: game.Teacher, q: game.QVariables, images: Array):
    """Return P's and Q's classes [B], H' [B], and samples of Q's activations."""
    graph, options = subject.networks.q, subject.options
    activations = {}

    def sample_activation(entry: Activation, x: Array) -> Array:
        state = q.ranges[entry.name]
        out = players.quantize_activation(entry, x, state, options)
        ends = quant.read_range(state, options.range_ema)
        activations[entry.name] = (_sample(x), _sample(out), *ends)
        return out

    p_logits = players.p_logits(graph, teacher.variables, images)
    hooks = Hooks(q.kernels, sample_activation, convolution=convolve)
    q_logits, _ = run(graph, q.variables, images, hooks)
    h = losses.normalised_entropy(p_logits, q_logits)
    return jnp.argmax(p_logits, -1), jnp.argmax(q_logits, -1), h, activations
