"""A short game whose only purpose is a G, for measurements before a run."""

import jax

from adadfq_jax import recipes
from adadfq_jax.game import GameState, Teacher
from adadfq_jax.network import Function
from adadfq_jax.runtime import sharding
from adadfq_jax.runtime.progress import log
from adadfq_jax.training import build, loop, sensitivity
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.images import draw_images
from adadfq_jax.training.sensitivity import Layer
from adadfq_jax.training.spec import RunSpec


def play_short(
    spec: RunSpec, batch_size: int, function: Function
) -> tuple[Assembly, Teacher, GameState]:
    """Train a G for as long as the recipe 'calibrate' does, on a single device.

    Args:
      spec: the settings of the run; G has the losses of its recipe.
      batch_size: number of images in a step.
      function: P with its variables.

    Returns:
      The parts of the game, P, and the state at its end.
    """
    short = recipes.CALIBRATE
    schedule = ["steps", "observe_steps", "warmup_steps", "rate_drops", "g_rate"]
    names = [*schedule, "q_average", "framed_weight"]
    values = {f"game.{name}": short.settings[name] for name in names}
    values |= {"reconstruction.iterations": 0, "calibration.images": 0}
    spec = spec.replace({**values, "population": "", "quant.budget": ""})
    log.info(f"a short game of {spec.game.steps} steps, for images to measure on")
    devices = jax.local_devices()[:1]
    assembly = build.assemble(spec, batch_size, function)
    steps, state = build.build_game(assembly, function.variables, devices)
    teacher, key = sharding.replicate(
        (assembly.teacher(function.variables), jax.random.key(spec.seed)), devices
    )
    state, _ = loop.fit(steps, state, (teacher, key), spec.game)
    return assembly, *sharding.fetch((teacher, state))


def measure_on_images(
    assembly: Assembly, teacher: Teacher, state: GameState
) -> list[Layer]:
    """Measure the sensitivity of every layer on images of G."""
    spec = assembly.spec
    count, framed = sensitivity.IMAGES, spec.reconstruction.framed
    images = draw_images(assembly, state, spec.seed, count, framed)
    graph, options = assembly.graph, assembly.parts.q_options
    log.info(f"sensitivity of {len(graph.kernels)} layers on {count} images")
    return sensitivity.measure(graph, options, teacher.variables, images)
