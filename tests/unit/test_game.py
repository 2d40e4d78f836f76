"""The two-player step: what moves in which phase, and many steps in one program."""

import functools

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import game, models, optim, recipes
from adadfq_jax.game import Phase, players, rollout
from adadfq_jax.models.generator import CifarGenerator, draw_inputs
from adadfq_jax.network import named
from tests import helpers

CLASSES, SHAPE, BATCH = 10, (8, 8, 3), 16


@functools.cache
def begin():
    """(step, state, P, a batch) of a game at 4 bits; the step takes Q's rate too."""
    graph = helpers.graph("tiny", CLASSES, SHAPE)
    module = models.get_model("tiny", num_classes=CLASSES)
    generator = CifarGenerator(CLASSES, SHAPE, channels=8)
    released, options = recipes.ADADFQ, game.QOptions(4, 4)

    def optimizers(q_rate):
        rates = [optim.between_drops(jnp.stack([x]), ()) for x in (1e-3, q_rate)]
        return {
            "g_optimizer": optim.generator_optimizer(rates[0]),
            "q_optimizer": optim.student_optimizer(rates[1], 1e-4),
        }

    @functools.partial(jax.jit, static_argnames="phase")
    def step(state, teacher, batch, q_rate, phase):
        play = game.make_play(
            networks=game.Networks(generator.apply, graph, graph),
            generator_loss=recipes.make_loss(released.generator, released.settings),
            student_loss=recipes.make_loss(released.student, released.settings),
            q_options=options,
            **optimizers(q_rate),
        )
        return play(state, teacher, batch, phase=phase)

    batch = game.Batch(*draw_inputs(jax.random.key(1), BATCH, CLASSES))
    image = jnp.zeros((1, *SHAPE))
    variables = named(jax.jit(module.init)(jax.random.key(2), image))
    state = game.init_state(
        g_variables=jax.jit(generator.init)(
            jax.random.key(3), batch.latents, batch.labels
        ),
        q_params={name: variables[name] for name in graph.parameters},
        q_ranges=players.init_ranges(graph),
        q_options=options,
        **optimizers(0.0),
    )
    teacher = game.with_clip_ratios(graph, variables, options)
    return step, state, teacher, batch


def is_p(state, teacher):
    """Asserts that Q's parameters are P's."""
    own = {name: teacher.variables[name] for name in state.q_params}
    chex.assert_trees_all_equal(state.q_params, own)


def test_a_rate_of_0_leaves_q_as_it_is():
    """The control of the results table: nothing but the rate moves Q."""
    step, state, teacher, batch = begin()
    state, _ = step(state, teacher, batch, 0.0, phase=Phase.BOTH)
    is_p(state, teacher)


def test_q_and_its_ranges_move_in_their_phases_only():
    step, state, teacher, batch = begin()
    observed, metrics = step(state, teacher, batch, 1e-4, phase=Phase.OBSERVE)
    is_p(observed, teacher)
    assert float(metrics["q_rate"]) == 0
    assert list(observed.q_ranges) == ["output.kernel:input", "unit.conv.kernel:input"]
    for state in observed.q_ranges.values():
        np.testing.assert_allclose(state.decay_power, 0.81, rtol=1e-6)  # twice

    frozen, _ = step(observed, teacher, batch, 1e-4, phase=Phase.G_ONLY)
    is_p(frozen, teacher)
    chex.assert_trees_all_equal(frozen.q_ranges, observed.q_ranges)

    both, metrics = step(frozen, teacher, batch, 1e-4, phase=Phase.BOTH)
    chex.assert_trees_all_equal(both.q_ranges, observed.q_ranges)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), both.q_params, frozen.q_params
    )
    assert all(jax.tree.leaves(moved))
    assert float(metrics["q_rate"]) == np.float32(1e-4)


@flax.struct.dataclass
class Counter:
    """A state of which a step is known by heart."""

    step: jax.Array
    first_bad_step: jax.Array


def test_a_rollout_is_its_steps_and_the_means_of_their_metrics():
    def count(state, teacher, key, phase):
        step = state.step + teacher
        metrics = {"h_quantiles": step * jnp.ones(5), "step": step}
        bad = jnp.where(step >= 3, 3, -1)
        state = Counter(step, jnp.maximum(state.first_bad_step, bad))
        return state, {**metrics, "first_bad_step": bad}

    start = Counter(jnp.float32(0), jnp.int32(-1))
    state, metrics = rollout.make_rollout(count, 4)(start, 1.0, None, Phase.BOTH)
    assert float(state.step) == 4
    assert float(metrics["step"]) == (1 + 2 + 3 + 4) / 4
    assert metrics["h_quantiles"].tolist() == [2.5] * 5
    assert int(metrics["first_bad_step"]) == 3
    assert rollout.make_rollout(count, 1) is count
