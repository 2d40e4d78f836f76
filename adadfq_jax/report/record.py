"""Recording during a game: both players' answers and Q's layers at a few steps.

The images are made from noise and labels of the recording's own, the same at every
step: the game's draws, its state and its numbers stay as they are.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax import game, losses, quant
from adadfq_jax.evaluation import AnySet
from adadfq_jax.evaluation.evaluator import normalise, to_pixels
from adadfq_jax.game import GameState
from adadfq_jax.models.generator import LATENT_SIZE
from adadfq_jax.models.layers import ActQuant
from adadfq_jax.report import snapshot
from adadfq_jax.report.snapshot import Answers, Layers, Snapshot
from adadfq_jax.runtime import sharding

GENERATED = 256  # images of G that are looked at, rounded up to whole batches
REAL = 512  # evaluation images, at most, rounded down to whole batches
CLASSES_SHOWN = 10
EACH_SHOWN = 6  # images of a class
DISPUTED_SHOWN = 20  # images on which P and Q disagree
_VALUES = 2**16  # of an activation, at most
_STREAM = 2**31 - 3  # of the seed's key; no step of a game gets so far
_SPAN = snapshot.SPAN
_INSIDE = (_SPAN[0] + 1e-6, _SPAN[1] - 1e-6)


class Subject(NamedTuple):
    """What is recorded, as plain values.

    networks, options: the game's. num_classes, seed, batch_size: the game's. mean,
    std: of P's normalisation. eval_set: evaluation images, or None.
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
    """At most `CLASSES_SHOWN` classes, evenly spaced."""
    count = min(num_classes, CLASSES_SHOWN)
    return np.unique(np.linspace(0, num_classes - 1, count).round().astype(int))


def labels_to_draw(num_classes: int, batch_size: int) -> np.ndarray:
    """Labels int32 of whole batches: enough of the shown classes, then all in turn."""
    shown = np.repeat(classes_shown(num_classes), EACH_SHOWN)
    total = math.ceil(max(GENERATED, len(shown)) / batch_size) * batch_size
    labels = np.concatenate([shown, np.arange(total - len(shown)) % num_classes])
    return np.random.default_rng(0).permutation(labels).astype(np.int32)


def choose_shown(
    labels: np.ndarray, p: np.ndarray, q: np.ndarray, num_classes: int
) -> np.ndarray:
    """Indices of the images to show: some of each shown class, and disputed ones.

    Args:
      labels: asked of G, or true, [N].
      p: P's classes [N].
      q: Q's classes [N].
      num_classes: of all.
    """
    classes = classes_shown(num_classes)
    of_classes = [np.flatnonzero(labels == c)[:EACH_SHOWN] for c in classes]
    disputed = np.flatnonzero(p != q)[:DISPUTED_SHOWN]
    return np.unique(np.concatenate([*of_classes, disputed]))


def _sample(x: Array) -> Array:
    """At most `_VALUES` values of x, evenly spaced and from all its channels."""
    stride = max(1, x.size // _VALUES)
    while math.gcd(stride, x.shape[-1]) > 1:
        stride += 1
    return x.reshape(-1)[::stride]


def _layers(rows: Sequence[tuple[str, Any, Any, Any, Any]]) -> Layers:
    """Layers from (name, values, quantized values, lo, hi), which broadcast."""
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


def modules_in_order(apply: Callable[..., Any], variables: Any, image: Any) -> list:
    """Names of a network's modules in the order in which a forward enters them."""
    entered: dict[str, None] = {}

    def look(next_function, args, kwargs, context):
        entered.setdefault(".".join(context.module.path))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(apply, variables, image)
    return list(entered)


def kernel_layers(
    state: GameState,
    options: game.QOptions,
    order: Sequence[str],
    clip_ratios: Mapping[str, Any],
) -> Layers:
    """Q's kernels; none where they are not quantized.

    Args:
      state: with the Q to deploy, see `game.to_deploy`.
      options: of Q.
      order: of the modules.
      clip_ratios: of the kernels, by name.
    """
    flat = flax.traverse_util.flatten_dict(state.q_params, sep=".")
    rows: list[Any] = []
    for name in order:
        kernel = flat.get(f"{name}.kernel")
        if kernel is not None and options.weight_bits is not None:
            bits = options.layer_bits.get(f"{name}.kernel", options.weight_bits)
            shrink = clip_ratios.get(f"{name}.kernel")
            lo, hi = quant.kernel_range(kernel, shrink)
            quantized = quant.fake_quant_kernel(kernel, bits, shrink)
            rows.append((name, *sharding.fetch((kernel, quantized, lo, hi))))
    return _layers(rows)


class Recorder:
    """Records a game at some steps.

    Args:
      workdir: of the run.
      subject: what is recorded.
      at: steps; each is recorded at the first pause that has reached it.
    """

    def __init__(self, workdir: Path, subject: Subject, at: Sequence[int]):
        self._workdir, self._subject, self._at = workdir, subject, at
        self._make = jax.jit(functools.partial(_make_images, subject))
        self._answer = jax.jit(functools.partial(_answer, subject))
        self._order: list[str] = []

    def resume(self, step: int) -> None:
        """Forgets what was recorded beyond `step`."""
        snapshot.drop_after(self._workdir, step)

    def is_due(self, step: int) -> bool:
        """Whether a step to record has been reached since the last recording."""
        last = max(snapshot.steps(self._workdir), default=-1)
        return any(last < at <= step for at in self._at)

    def record(
        self,
        state: GameState,
        p_variables: Any,
        p_top1: float | None,
        q_top1: float | None,
    ) -> None:
        """Records the players as they are.

        Args:
          state: of the game.
          p_variables: of P.
          p_top1: in per cent, None where there is no evaluation.
          q_top1: the same, None where not measured at this step.
        """
        # One device's copy of what is the same on all of them.
        state, p_variables = jax.tree.map(
            lambda x: x.addressable_data(0), (state, p_variables)
        )
        state = game.to_deploy(state)
        subject = self._subject
        labels = labels_to_draw(subject.num_classes, subject.batch_size)
        batches = labels.reshape(-1, subject.batch_size)
        made = [self._make(state, i, batch) for i, batch in enumerate(batches)]
        if not self._order:
            q_variables = game.q_variables(state, p_variables, subject.options)
            q_apply = subject.networks.q_apply
            self._order = modules_in_order(q_apply, q_variables, made[0])
        collect = functools.partial(
            self._collect, functools.partial(self._answer, p_variables, state)
        )
        generated, h, activations = collect(made, labels)
        real = real_activations = None
        if subject.eval_set is not None:
            real, _, real_activations = collect(*self._real_batches(subject.eval_set))
        snapshot.write(
            self._workdir,
            Snapshot(
                step=int(state.step),
                p_top1=math.nan if p_top1 is None else p_top1,
                q_top1=math.nan if q_top1 is None else q_top1,
                h=h,
                generated=generated,
                real=real,
                kernels=kernel_layers(
                    state,
                    subject.options,
                    self._order,
                    p_variables[game.CLIP_RATIOS],
                ),
                activations=activations,
                real_activations=real_activations,
            ),
        )

    def _real_batches(self, eval_set: AnySet) -> tuple[list[np.ndarray], np.ndarray]:
        """Normalised batches of evaluation images and all their labels."""
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
        """Answers, H' and activations (of the first batch) on batches of images."""
        answers = [answer(images) for images in batches]
        # The others' samples of activations never leave the device.
        samples = sharding.fetch(answers[0][3])
        found = sharding.fetch([a[:3] for a in answers])
        p, q, h = (np.concatenate(part) for part in zip(*found, strict=True))
        shown = choose_shown(labels, p, q, self._subject.num_classes)
        images = np.concatenate(sharding.fetch(list(batches)))[shown]
        layers = _layers([(n, *samples[n]) for n in self._order if n in samples])
        pixels = to_pixels(images, self._subject.mean, self._subject.std)
        return Answers(labels, p, q, shown.astype(np.int32), pixels), h, layers


def _make_images(subject: Subject, state: GameState, number: int, labels: Array):
    """A batch of G's images, batch norm over the batch as in the game."""
    key = jax.random.fold_in(jax.random.key(subject.seed), _STREAM)
    key = jax.random.fold_in(key, number)
    latents = jax.random.normal(key, (subject.batch_size, LATENT_SIZE))
    variables = {"params": state.g_params, "batch_stats": state.g_batch_stats}
    images, _ = subject.networks.g_apply(
        variables, latents, labels, mutable=["batch_stats"]
    )
    return images


def _answer(subject: Subject, p_variables: Any, state: GameState, images: Array):
    """Classes of P and Q [B], H' [B], and samples of Q's activations by name."""
    samples: dict[str, tuple[Array, Array]] = {}

    def look(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        if isinstance(context.module, ActQuant):
            name = ".".join(context.module.path)
            samples[name] = _sample(args[0]), _sample(out)
        return out

    p_logits = subject.networks.p_apply(p_variables, images)
    q_variables = game.q_variables(state, p_variables, subject.options)
    with nn.intercept_methods(look):
        q_logits = subject.networks.q_apply(q_variables, images)
    ranges = {
        name: quant.read_range(quant.RangeState(*stored), subject.options.range_ema)
        for name, stored in _range_states(game.final_ranges(state)).items()
    }
    activations = {name: (*samples[name], *ranges[name]) for name in samples}
    h = losses.normalised_entropy(p_logits, q_logits)
    return jnp.argmax(p_logits, -1), jnp.argmax(q_logits, -1), h, activations


def _range_states(q_ranges: Any) -> dict[str, Any]:
    """Range states by the name of their quantizer."""
    leaves = jax.tree_util.tree_leaves_with_path(
        q_ranges, is_leaf=lambda node: isinstance(node, quant.RangeState)
    )
    return {".".join(key.key for key in path[:-1]): leaf for path, leaf in leaves}
