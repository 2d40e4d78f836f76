"""One step of the two-player game, as a pure function.

G makes images that suit Q, and Q learns from P on them. The step is a function of
(state, P, batch, phase); networks, losses and optimizers are arguments of `make_play`.
P is an argument of the step: it is not part of the state and not compiled in.
"""

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax import losses
from adadfq_jax.game import framing, players
from adadfq_jax.game.collectives import global_moments, mean_over
from adadfq_jax.game.players import QOptions, QVariables, Teacher
from adadfq_jax.losses import LossInputs
from adadfq_jax.network import Graph, statistics
from adadfq_jax.optim import Optimizer

Apply = Callable[[Array], Array]  # images -> logits
H_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)  # the quantiles of H' in the metrics


class Phase(enum.Enum):
    """A phase of the game. G trains in every phase; the phases differ in Q."""

    OBSERVE = "observe"  # Q's ranges move, Q does not train
    G_ONLY = "g_only"  # Q's ranges are frozen, Q does not train
    BOTH = "both"  # Q's ranges are frozen, Q trains


class GameState(flax.struct.PyTreeNode):
    """Everything that the game changes. Q always uses P's batch statistics.

    Attributes:
      step: number of steps taken so far.
      first_bad_step: the first step that made a number that is not finite, -1 if none.
      g_params: G's parameters.
      g_batch_stats: G's batch statistics.
      g_opt_state: the state of G's optimizer.
      q_params: Q's parameters, by name.
      q_ranges: moving averages of the activation ranges.
      q_opt_state: the state of Q's optimizer.
      q_average: the average of Q's parameters over the steps, {} where none is kept.
    """

    step: Array
    first_bad_step: Array
    g_params: Any
    g_batch_stats: Any
    g_opt_state: Any
    q_params: Any
    q_ranges: Any
    q_opt_state: Any
    q_average: Any


class Batch(NamedTuple):
    """The random inputs of a step.

    Attributes:
      latents: [B, 100].
      labels: int32 [B].
      frames: the frames of `recipes.framed_view`, see `framing.draw_frames`, or None.
    """

    latents: Array
    labels: Array
    frames: framing.Frames | None = None


class ViewLoss(NamedTuple):
    """A term of Q's loss that makes its own images of G's images.

    Attributes:
      name: name of the term in the log.
      value: (apply_p, apply_q, images, batch) -> scalar. apply_p and apply_q map images
        [B, ...] to logits. images is this device's share of G's images, without a
        gradient to G; batch is this device's share of the `Batch`.
      weight: weight of the term in Q's loss.
    """

    name: str
    value: Callable[[Apply, Apply, Array, Batch], Array]
    weight: float


class Networks(NamedTuple):
    """The networks of a game.

    Attributes:
      g_apply: the `apply` of G's Linen module.
      p: the traced network as P computes it.
      q: the same network as Q computes it; only the dtype of the images that it was
        traced with may differ.
    """

    g_apply: Callable[..., Any]
    p: Graph
    q: Graph


def q_variables(
    state: GameState, teacher: Teacher, graph: Graph, options: QOptions
) -> QVariables:
    """Quantize Q as it is in a state, for `players.q_logits`.

    Args:
      state: the game's state.
      teacher: P.
      graph: Q's graph.
      options: Q's options.
    """
    return players.quantize(graph, options, teacher, state.q_params, state.q_ranges)


def to_deploy(state: GameState) -> GameState:
    """Replace Q's parameters by their average, where one is kept."""
    return state.replace(q_params=state.q_average) if state.q_average else state


def first_bad(so_far: Array, step: Array, made: Any) -> Array:
    """Find the first step that made a number that is not finite, -1 if there is none.

    Args:
      so_far: the result for the steps before this one.
      step: the number of this step.
      made: the tree of numbers that this step made.
    """
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(made)]
    bad = ~jnp.all(jnp.stack(leaves))
    return jnp.maximum(so_far, jnp.where(bad & (so_far < 0), step, -1))


def make_play(
    *,
    networks: Networks,
    generator_loss: losses.Loss,
    student_loss: losses.Loss,
    g_optimizer: Optimizer,
    q_optimizer: Optimizer,
    q_options: QOptions,
    views: Sequence[ViewLoss] = (),
    axis_name: str | None = None,
) -> Callable[..., tuple[GameState, dict[str, Array]]]:
    """Make the function that takes one step of the game on a given batch.

    1. x = G(z, y), with G's batch norms in training mode.
    2. p = P(x), with the statistics of its batch norms' inputs; q = Q(x).
    3. Adam moves G; the gradient reaches x through P and straight through Q.
    4. Nesterov SGD moves Q, in `Phase.BOTH` only. x and p are constants there. Q may
       also learn on views of x, which G does not see and the paper does not have.

    In `Phase.OBSERVE`, Q runs a second time, so that the ranges move twice a step
    (released code). Once the ranges are frozen, both forward passes would give the same
    numbers, so one pass serves both losses: two cotangents go through one vjp.

    Args:
      networks: the networks of the game.
      generator_loss: G's loss; see `recipes.make_loss`.
      student_loss: Q's loss.
      g_optimizer: G's optimizer.
      q_optimizer: Q's optimizer.
      q_options: Q's options.
      views: further terms of Q's loss, on images made of x.
      axis_name: mapped axis over which the global batch is split, or None.

    Returns:
      `play(state, teacher, batch, phase)` -> (state, metrics), where `batch` is this
      device's share of a `Batch`. The metrics are scalars (the quantiles of H' are [5])
      over the global batch, computed before the update. `student` leaves the views out.
      `first_bad_step` is the value in the new state.
    """

    def run_g(state, batch, g_params):
        variables = {"params": g_params, "batch_stats": state.g_batch_stats}
        images, updates = networks.g_apply(
            variables, batch.latents, batch.labels, mutable=["batch_stats"]
        )
        return images, updates["batch_stats"]

    def run_p(teacher, images):
        images = images.astype(networks.p.dtype)
        logits, bn_inputs = players.p_forward(networks.p, teacher.variables, images)
        return logits, global_moments(bn_inputs, axis_name)

    def run_q(state, teacher, phase, q_params, images):
        q = players.quantize(networks.q, q_options, teacher, q_params, state.q_ranges)
        if phase is Phase.OBSERVE:
            return players.q_observe(networks.q, q_options, q, images, axis_name)
        return players.q_logits(networks.q, q_options, q, images), state.q_ranges

    def loss_inputs(teacher, labels, p_logits, q_logits, bn_inputs):
        running = statistics(networks.p, teacher.variables)
        return LossInputs(p_logits, q_logits, labels, bn_inputs, running, axis_name)

    def view_loss(q_params, value, state, teacher, images, batch):
        def apply_p(x):
            return run_p(teacher, x)[0]

        def apply_q(x):
            return run_q(state, teacher, Phase.BOTH, q_params, x)[0]

        return value(apply_p, apply_q, images, batch)

    def train_q(state, grads):
        q_params, opt_state = q_optimizer.update(
            mean_over(grads, axis_name),
            state.q_opt_state,
            state.q_params,
            state.step,
        )
        state = state.replace(q_params=q_params, q_opt_state=opt_state)
        keep = q_options.average
        average = jax.tree.map(
            lambda a, b: keep * a + (1 - keep) * b,
            state.q_average,
            state.q_params if keep else {},
        )
        return state.replace(q_average=average)

    def play(state, teacher, batch, phase):
        labels = batch.labels
        images, g_vjp, g_batch_stats = jax.vjp(
            functools.partial(run_g, state, batch), state.g_params, has_aux=True
        )
        (p_logits, bn_inputs), p_vjp = jax.vjp(
            functools.partial(run_p, teacher), images
        )
        q_logits, q_vjp, q_ranges = jax.vjp(
            functools.partial(run_q, state, teacher, phase),
            state.q_params,
            images,
            has_aux=True,
        )
        assert p_logits.shape == q_logits.shape
        inputs = functools.partial(loss_inputs, teacher, labels)

        (g_loss, g_terms), (p_bar, q_bar, bn_bar) = jax.value_and_grad(
            lambda *args: generator_loss(inputs(*args)), (0, 1, 2), has_aux=True
        )(p_logits, q_logits, bn_inputs)
        (through_p,) = p_vjp((p_bar, bn_bar))
        _, through_q = q_vjp(q_bar)
        (g_grads,) = g_vjp(through_p + through_q)
        g_params, g_opt_state = g_optimizer.update(
            mean_over(g_grads, axis_name),
            state.g_opt_state,
            state.g_params,
            state.step,
        )

        q_again = q_logits
        if phase is Phase.OBSERVE:
            moved = state.replace(q_ranges=q_ranges)
            q_again, q_ranges = run_q(moved, teacher, phase, state.q_params, images)
        (q_loss, q_terms), q_bar = jax.value_and_grad(
            lambda q: student_loss(inputs(p_logits, q, bn_inputs)), has_aux=True
        )(q_again)
        state = state.replace(
            g_params=g_params,
            g_batch_stats=g_batch_stats,
            g_opt_state=g_opt_state,
            q_ranges=q_ranges,
        )
        q_rate = jnp.zeros(())
        if phase is Phase.BOTH:
            q_grads, _ = q_vjp(q_bar)
            for view in views:
                q_terms[view.name], more = jax.value_and_grad(view_loss)(
                    state.q_params, view.value, state, teacher, images, batch
                )
                q_grads = jax.tree.map(
                    lambda a, b, weight=view.weight: a + weight * b, q_grads, more
                )
            q_rate = q_optimizer.rate(state.step)
            state = train_q(state, q_grads)

        metrics = {"generator": g_loss, "student": q_loss, **g_terms, **q_terms}
        metrics |= _observations(p_logits, q_logits, labels, axis_name)
        metrics = mean_over(metrics, axis_name)
        metrics |= {"g_rate": g_optimizer.rate(state.step), "q_rate": q_rate}
        # The new state is checked too: gradients can fail where losses are finite.
        made = (metrics, state.replace(step=(), first_bad_step=()))
        metrics["first_bad_step"] = first_bad(state.first_bad_step, state.step, made)
        state = state.replace(
            step=state.step + 1, first_bad_step=metrics["first_bad_step"]
        )
        return state, metrics

    return play


def _observations(p_logits, q_logits, labels, axis_name) -> dict[str, Array]:
    """Compute the metrics that are in no loss: H' and P's agreement with y."""
    h = losses.normalised_entropy(p_logits, q_logits, axis_name)
    if axis_name is not None:
        h = jax.lax.all_gather(h, axis_name, tiled=True)
    return {
        "h_mean": jnp.mean(h),
        "h_quantiles": jnp.quantile(h, jnp.asarray(H_QUANTILES)),
        "p_agrees": jnp.mean((jnp.argmax(p_logits, -1) == labels).astype(jnp.float32)),
    }


def init_state(
    *,
    g_variables: Any,
    q_params: Any,
    q_ranges: Any,
    g_optimizer: Optimizer,
    q_optimizer: Optimizer,
    q_options: QOptions,
) -> GameState:
    """Make the state before the first step.

    Args:
      g_variables: G's initial {'params', 'batch_stats'}.
      q_params: Q's parameters before the game, which are P's, by name.
      q_ranges: the ranges of Q's activations, see `players.init_ranges`.
      g_optimizer: G's optimizer.
      q_optimizer: Q's optimizer.
      q_options: Q's options.
    """
    return GameState(
        step=jnp.zeros((), jnp.int32),
        first_bad_step=jnp.full((), -1, jnp.int32),
        g_params=g_variables["params"],
        g_batch_stats=g_variables["batch_stats"],
        g_opt_state=g_optimizer.init(g_variables["params"]),
        q_params=q_params,
        q_ranges=q_ranges,
        q_opt_state=q_optimizer.init(q_params),
        q_average=q_params if q_options.average else {},
    )
