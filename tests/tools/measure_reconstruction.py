"""Measures reconstruction or calibration on generated images.

    PYTHONPATH=. python tests/tools/measure_reconstruction.py --config=FILE:w4a4 \
        [--bits=w4a4,w3a3,w2a4] [--seeds=0,1,2] [--real=FOLDER] [--config.KEY=VALUE ...]

For each of the bits and seeds: the game of the configuration, whose recipe must
reconstruct or calibrate, and that on G's images. Beside a reconstruction, as a control
that a user without data cannot have, the same one from the same start on the images in
FOLDER (a folder of images for each class). Prints a row for each:

    P         top-1 of the full-precision network, per cent
    before    of Q quantized, nothing trained
    last      of Q reconstructed or calibrated; it is measured once
    real      of Q reconstructed on real images
    minutes   of all that, with compiling; without measuring

and the means over the seeds with the sample standard deviation of `last`.
"""

import functools
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from adadfq_jax import config as base
from adadfq_jax import evaluation, game
from adadfq_jax.evaluation.evaluator import normalise
from adadfq_jax.game import players
from adadfq_jax.runtime import compile_cache, sharding
from adadfq_jax.training import build, loop, run
from adadfq_jax.training.measurements import make_evaluator
from adadfq_jax.training.reconstruct import make_reconstruction
from adadfq_jax.training.spec import RunSpec, resolve

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run.")
_BITS = flags.DEFINE_list("bits", ["w4a4", "w3a3", "w2a4"], "Which to measure.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Which to measure.")
_REAL = flags.DEFINE_string("real", "", "Folder of real images, for the control.")

HEAD = ("bits", "seed", "P", "before", "last", "real", "minutes")


class Measured(NamedTuple):
    """A row; top-1 in per cent, `real` None without a control."""

    p: float
    before: float
    last: float
    real: float | None
    seconds: float


def real_images(spec: RunSpec, folder: str) -> np.ndarray:
    """As many real images as the reconstruction takes, spread over the classes."""
    own = {
        "eval.data_dir": folder,
        "eval.split": "validation",
        "eval.dataset": "folder",
    }
    chosen = spec.replace(own).eval
    found = evaluation.load_eval_set(
        chosen, spec.teacher.image_shape, spec.teacher.num_classes
    )
    pixels = found.first(found.size).images
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels = pixels[order[: spec.reconstruction.images]]
    return np.asarray(normalise(pixels, spec.teacher.mean, spec.teacher.std))


def measure(spec: RunSpec, p_file: build.Loaded, real: str) -> Measured:
    """Trains one network, twice from the same start where there are real images."""
    devices, batch_size = sharding.choose_devices(
        spec.devices, spec.game.batch_size, spec.game.batch_rule
    )
    assembly = build.assemble(spec, batch_size, p_file.function)
    variables = p_file.function.variables
    evaluator = make_evaluator(
        spec.eval,
        assembly.info,
        evaluation.load_eval_set(
            spec.eval, assembly.info.image_shape, assembly.info.num_classes
        ),
        devices,
    )
    graph, options = assembly.graph, assembly.parts.q_options
    top1_of_q = evaluator(functools.partial(players.q_logits, graph, options)).top1
    top1_of_p = evaluator(functools.partial(players.p_logits, graph)).top1

    begin = time.monotonic()
    teacher = sharding.replicate(assembly.teacher(variables), devices)
    steps, state = build.build_game(assembly, variables, devices)
    key = sharding.replicate(jax.random.key(spec.seed), devices)
    state, _ = loop.fit(steps, state, (teacher, key), spec.game)
    phase = make_reconstruction(assembly, devices)

    def reconstructed(images: Any = None) -> game.QVariables:
        if phase is None:
            return run.freeze(assembly, state, teacher).variables
        ended, _ = phase.fit(state, teacher, spec.seed, images=images)
        return run.freeze(assembly, ended, teacher, phase).variables

    last = reconstructed()
    seconds = time.monotonic() - begin
    quantize = jax.jit(
        functools.partial(game.q_variables, graph=graph, options=options)
    )
    control = None
    if real and phase is not None:
        control = top1_of_q(reconstructed(jnp.asarray(real_images(spec, real))))
    return Measured(
        top1_of_p(teacher.variables),
        top1_of_q(quantize(game.to_deploy(state), teacher)),
        top1_of_q(last),
        control,
        seconds,
    )


def row(bits: str, seed: str, measured: Measured, spread: str = "") -> str:
    numbers = [
        "-" if top1 is None else f"{top1:.2f}"
        for top1 in (measured.p, measured.before, measured.last, measured.real)
    ]
    numbers[2] += spread
    cells = [bits.upper(), seed, *numbers, f"{measured.seconds / 60:.1f}"]
    return f"| {' | '.join(cells)} |"


def mean_of(rows: list[Measured]) -> Measured:
    def mean(values: tuple) -> Any:
        return None if None in values else statistics.fmean(values)

    return Measured(*map(mean, zip(*rows, strict=True)))


def main(argv: list[str]) -> None:
    del argv
    compile_cache.enable()
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
    for bits in _BITS.value:
        weight_bits, act_bits, _ = base.parse_argument(bits, bits)
        rows = []
        for seed in _SEEDS.value:
            config = _CONFIG.value.copy_and_resolve_references()
            config.quant.weight_bits, config.quant.act_bits = weight_bits, act_bits
            config.seed = int(seed)
            spec = resolve(config)
            if not (spec.reconstruction.iterations or spec.calibration.images):
                sys.exit(f"error: recipe {spec.recipe} reconstructs nothing")
            with jax.default_matmul_precision(spec.matmul_precision):
                loaded = build.load_teacher(spec)
                rows.append(measure(loaded.spec, loaded, _REAL.value))
            print(row(bits, seed, rows[-1]), flush=True)
            jax.clear_caches()  # a process may map so many pieces of memory
        if len(rows) > 1:
            spread = f" +-{statistics.stdev(each.last for each in rows):.2f}"
            print(row(bits, "mean", mean_of(rows), spread), flush=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
