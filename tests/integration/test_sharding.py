"""The same game on 1, 2 and 8 devices, each of which sees other images."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from adadfq_jax import game, models, optim, recipes
from adadfq_jax.game import Phase, framing, players, rollout
from adadfq_jax.models.generator import CifarGenerator, draw_inputs
from adadfq_jax.network import named
from adadfq_jax.runtime import sharding
from tests import helpers

AXIS = sharding.AXIS
CLASSES, SHAPE, BATCH = 5, (8, 12, 2), 16
RECIPE = recipes.ADADFQ.adding(lambda_l=0.3, lambda_u=0.6, temperature=5.0)


PHASES = (
    Phase.OBSERVE,
    Phase.OBSERVE,
    Phase.G_ONLY,
    Phase.BOTH,
    Phase.BOTH,
    Phase.BOTH,
)


@functools.cache
def play_on(count, bits, phases=PHASES):
    """Plays phases on `count` devices: metrics and state by step, traced phases.

    Q learns from framed images, too.
    """
    devices = jax.devices()[:count]
    graph = helpers.graph("tiny", CLASSES, SHAPE)
    module = models.get_model("tiny", num_classes=CLASSES)
    options = game.QOptions(bits, bits, act_range="l3")
    generator = CifarGenerator(CLASSES, SHAPE, axis_name=AXIS)
    g_optimizer = optim.generator_optimizer(optax.constant_schedule(1e-3))
    q_optimizer = optim.student_optimizer(optax.constant_schedule(1e-2), 1e-4)
    student_loss = recipes.make_loss(RECIPE.student, RECIPE.settings)
    play = game.make_play(
        networks=game.Networks(generator.apply, graph, graph),
        generator_loss=recipes.make_loss(RECIPE.generator, RECIPE.settings),
        student_loss=student_loss,
        g_optimizer=g_optimizer,
        q_optimizer=q_optimizer,
        q_options=options,
        views=[recipes.framed_view(student_loss, 0.5, AXIS)],
        axis_name=AXIS,
    )

    def draw(key):
        batch = game.Batch(*draw_inputs(key, BATCH, CLASSES))
        frames_key = jax.random.fold_in(key, 2)
        black, white = -jnp.ones(2), jnp.ones(2)
        frames = framing.draw_frames(frames_key, BATCH, SHAPE, black, white)
        return batch._replace(frames=frames)

    step = rollout.make_game_step(play, draw=draw, axis_name=AXIS)
    traced = []

    def counted(*args, phase):
        traced.append(phase)
        return step(*args, phase=phase)

    compiled = {
        phase: sharding.parallel_step(functools.partial(counted, phase=phase), devices)
        for phase in Phase
    }
    image, key = jnp.zeros((1, *SHAPE)), jax.random.key(3)
    teacher = named(jax.jit(module.init)(jax.random.key(1), image))
    # Q starts elsewhere, so that there is a disagreement without quantization too.
    other = named(jax.jit(module.init)(jax.random.key(2), image))
    state = game.init_state(
        g_variables=jax.jit(generator.init)(key, *draw_inputs(key, BATCH, CLASSES)),
        q_params={name: other[name] for name in graph.parameters},
        q_ranges=players.init_ranges(graph),
        g_optimizer=g_optimizer,
        q_optimizer=q_optimizer,
        q_options=options,
    )
    fixed = game.Teacher(teacher, {})
    state, fixed, key = sharding.replicate((state, fixed, key), devices)
    metrics, states = [], []
    for phase in phases:
        state, measured = compiled[phase](state, fixed, key)
        metrics.append(jax.device_get(measured))
        states.append(jax.device_get(state))
    return metrics, states, traced


@pytest.mark.parametrize("count", [1, 2, 8])
def test_one_trace_per_phase(count):
    traced = play_on(count, None)[2]
    assert sorted(phase.value for phase in traced) == ["both", "g_only", "observe"]


@pytest.mark.parametrize("count", [2, 8])
def test_the_smooth_game_is_the_same_on_any_number_of_devices(count):
    metrics, states, _ = play_on(count, None)
    for ours, theirs in zip(metrics, play_on(1, None)[0], strict=True):
        chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)
    ours, theirs = states[-1], play_on(1, None)[1][-1]
    for part in ("q_params", "q_opt_state"):
        chex.assert_trees_all_close(
            getattr(ours, part), getattr(theirs, part), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("count", [2, 8])
def test_the_quantized_game_is_the_same_on_any_number_of_devices(count):
    """Losses and ranges of the first step; later, rounding flips tell them apart."""
    metrics, states, _ = play_on(count, 4, PHASES[:1])
    chex.assert_trees_all_close(
        metrics[0], play_on(1, 4, PHASES[:1])[0][0], rtol=1e-4, atol=1e-6
    )
    ours, theirs = states[0].q_ranges, play_on(1, 4, PHASES[:1])[1][0].q_ranges
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)
