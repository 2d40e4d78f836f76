"""Measures how well the divergence on generated images predicts the loss of top-1.

    PYTHONPATH=. python tests/tools/measure_sensitivity.py --config=FILE:w4a4 \
        [--bits=2,3] [--images=2000] [--config.KEY=VALUE ...]

A short game trains a G, and the sensitivity of every layer is measured on its images.
Then every layer alone is quantized to the same bits, and its loss of top-1 is measured
on real images. Prints both for each layer, the layers with the largest divergence
first, and for each number of bits Spearman's rank correlation over the layers.
"""

import functools

import jax
import numpy as np
import scipy.stats
from absl import app, flags
from ml_collections import config_flags

from adadfq_jax import evaluation
from adadfq_jax.evaluation.evaluator import normalise
from adadfq_jax.runtime import compile_cache
from adadfq_jax.training import build, sensitivity
from adadfq_jax.training.images import draw_images
from adadfq_jax.training.short_game import measure_on_images, play_short
from adadfq_jax.training.spec import resolve

_CONFIG = config_flags.DEFINE_config_file("config", None, "The network and the images.")
_BITS = flags.DEFINE_list("bits", ["2", "3"], "Numbers of bits.")
_IMAGES = flags.DEFINE_integer("images", 2000, "Real images.")
BATCH = 500


def main(argv: list[str]) -> None:
    del argv
    compile_cache.enable()
    spec = resolve(_CONFIG.value)
    with jax.default_matmul_precision(spec.matmul_precision):
        loaded = build.load_teacher(spec)
        spec = loaded.spec
        size = spec.game.batch_size
        assembly, teacher, state = play_short(spec, size, loaded.function)
        layers = measure_on_images(assembly, teacher, state)
        real = evaluation.load_eval_set(
            spec.eval, assembly.info.image_shape, assembly.info.num_classes
        ).first(_IMAGES.value)
        images = normalise(real.images, spec.teacher.mean, spec.teacher.std)
        drawn = draw_images(assembly, state, spec.seed, sensitivity.IMAGES, 0.5)
        programs = sensitivity.Programs(
            assembly.graph, assembly.parts.q_options, teacher.variables, [drawn]
        )
        classes = jax.jit(functools.partial(_classes, programs))

        def top1(kernel: str, activation: str, bits: int) -> float:
            own = programs.quantized(kernel, activation, bits)
            found = [
                classes(teacher.variables, images[i : i + BATCH], *own)
                for i in range(0, len(images), BATCH)
            ]
            return 100 * float(np.mean(np.concatenate(found) == real.labels))

        p_top1 = top1("", "", 8)
        print(f"P {p_top1:.2f} % of {len(images)} images")
        for bits in map(int, _BITS.value):
            losses = []
            chosen = sensitivity.ranked(layers, bits)
            for layer in chosen:
                losses.append(p_top1 - top1(layer.kernel, layer.activation, bits))
                told = f"{layer.at(bits):.5f} nats, {losses[-1]:.2f} points"
                print(f"{bits} bits, {layer.name}: {told}", flush=True)
            found = scipy.stats.spearmanr([x.at(bits) for x in chosen], losses)
            print(f"{bits} bits: Spearman {found.statistic:.2f}", flush=True)


def _classes(programs, *arguments):
    return programs.logits(*arguments).argmax(-1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
