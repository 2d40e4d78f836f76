"""The two-player step: what moves in which phase, and many steps in one program."""

import functools

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import game, models, optim, recipes
from adadfq_jax.game import Phase, rollout
from adadfq_jax.models import layers
from adadfq_jax.models.generator import CifarGenerator, draw_inputs

CLASSES, SHAPE, BATCH = 10, (8, 8, 3), 16


def begin(q_rate):
    """(step, state, P's variables, a batch) of a game at 4 bits."""
    act_quant = functools.partial(layers.ActQuant, bits=4)
    student = models.get_model("tiny", num_classes=CLASSES, act_quant=act_quant)
    teacher_model = models.get_model("tiny", num_classes=CLASSES)
    generator = CifarGenerator(CLASSES, SHAPE)
    g_optimizer = optim.generator_optimizer(optim.step_decay(1e-3, ()))
    q_optimizer = optim.student_optimizer(optim.step_decay(q_rate, ()), 1e-4)
    released = recipes.ADADFQ
    play = game.make_play(
        networks=game.Networks(generator.apply, teacher_model.apply, student.apply),
        generator_loss=recipes.make_loss(released.generator, released.settings),
        student_loss=recipes.make_loss(released.student, released.settings),
        g_optimizer=g_optimizer,
        q_optimizer=q_optimizer,
        q_options=game.QOptions(4),
    )
    batch = game.Batch(*draw_inputs(jax.random.key(1), BATCH, CLASSES))
    image = jnp.zeros((1, *SHAPE))
    p_variables = jax.jit(teacher_model.init)(jax.random.key(2), image)
    q_init = jax.jit(student.init)(jax.random.key(2), image)
    state = game.init_state(
        g_variables=jax.jit(generator.init)(
            jax.random.key(3), batch.latents, batch.labels
        ),
        q_init={"params": p_variables["params"], "ranges": q_init["ranges"]},
        g_optimizer=g_optimizer,
        q_optimizer=q_optimizer,
        q_options=game.QOptions(None),
    )
    return jax.jit(play, static_argnames="phase"), state, p_variables, batch


def test_a_rate_of_0_leaves_q_as_it_is():
    """The control of the results table: nothing but the rate moves Q."""
    step, state, p_variables, batch = begin(q_rate=0.0)
    state, _ = step(state, p_variables, batch, phase=Phase.BOTH)
    chex.assert_trees_all_equal(state.q_params, p_variables["params"])


def test_q_and_its_ranges_move_in_their_phases_only():
    step, state, p_variables, batch = begin(q_rate=1e-4)
    observed, metrics = step(state, p_variables, batch, phase=Phase.OBSERVE)
    chex.assert_trees_all_equal(observed.q_params, p_variables["params"])
    assert float(metrics["q_rate"]) == 0
    range_state = observed.q_ranges["init_quant"]["range"]
    np.testing.assert_allclose(range_state.decay_power, 0.81, rtol=1e-6)  # twice

    frozen, _ = step(observed, p_variables, batch, phase=Phase.G_ONLY)
    chex.assert_trees_all_equal(frozen.q_params, p_variables["params"])
    chex.assert_trees_all_equal(frozen.q_ranges, observed.q_ranges)

    both, metrics = step(frozen, p_variables, batch, phase=Phase.BOTH)
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
    def count(state, p_variables, key, phase):
        step = state.step + p_variables
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
