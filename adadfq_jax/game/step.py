"""One step of the two-player game, as a pure function.

G makes images that suit Q, Q learns from P on them. The step is a function of
(state, P, key); networks, losses and optimizers are arguments of the
factory. P is an argument of the step: it is neither state nor compiled in.
"""

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax import losses, quant
from adadfq_jax.game import framing, players
from adadfq_jax.game.collectives import global_moments, mean_over
from adadfq_jax.game.players import QOptions, QVariables, Teacher
from adadfq_jax.losses import LossInputs
from adadfq_jax.network import Graph, statistics
from adadfq_jax.optim import Optimizer

Apply = Callable[[Array], Array]  # images -> logits
H_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of H', in the metrics


class Phase(enum.Enum):
    """What happens in a step. G trains in all of them."""

    OBSERVE = "observe"  # Q's ranges move, Q does not train
    G_ONLY = "g_only"  # ranges frozen, Q does not train
    BOTH = "both"  # ranges frozen, Q trains


class GameState(flax.struct.PyTreeNode):
    """Everything that the game changes. Q always uses P's batch statistics.

    Attributes:
      step: steps taken so far.
      first_bad_step: the first step that made a number that is not finite, -1 so far.
      q_ranges: moving averages of the activation ranges.
      q_bounds: the ranges (lo, hi) that Q's optimizer moves, {} where it moves none.
      q_average: the average of Q's parameters over its steps, {} where none is kept.
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
    q_bounds: Any


class Batch(NamedTuple):
    """What is drawn for a step.

    latents: [B, 100]. labels: int32 [B]. frames: for `recipes.framed_view`, see
    `framing.draw_frames`, or None.
    """

    latents: Array
    labels: Array
    frames: framing.Frames | None = None


class ViewLoss(NamedTuple):
    """A term of Q's loss on images that it makes itself of G's images.

    name: in the log. value: (apply_p, apply_q, images, batch) -> scalar, where apply_p
    and apply_q take images [B, ...] and give logits, images are this device's share of
    G's, without a gradient to G, and batch is the share of the `Batch`. weight: of the
    term in Q's loss.
    """

    name: str
    value: Callable[[Apply, Apply, Array, Batch], Array]
    weight: float


class Networks(NamedTuple):
    """The networks of a game.

    g_apply: of G's Linen module. p, q: the traced network as P and as Q compute it, the
    same but for the type of the images that it was traced with.
    """

    g_apply: Callable[..., Any]
    p: Graph
    q: Graph


def q_variables(
    state: GameState, teacher: Teacher, graph: Graph, options: QOptions
) -> QVariables:
    """Q as it is in a state: what `players.q_logits` takes.

    Args:
      state: of the game.
      teacher: P.
      graph: of Q.
      options: of Q.
    """
    return players.quantize(
        graph, options, teacher, state.q_params, final_ranges(state)
    )


def final_ranges(state: GameState) -> Any:
    """The activation ranges that Q quantizes with: the learned ones, or averages."""
    if not state.q_bounds:
        return state.q_ranges
    return {name: quant.fixed_range(*bounds) for name, bounds in state.q_bounds.items()}


def to_deploy(state: GameState) -> GameState:
    """The state with the Q that counts: its average, where one is kept."""
    return state.replace(q_params=state.q_average) if state.q_average else state


def _trained(state: GameState) -> Any:
    """The tree that Q's optimizer moves: parameters, and learned ranges' bounds."""
    bounds = {"bounds": state.q_bounds} if state.q_bounds else {}
    return {"params": state.q_params, **bounds}


def _with_trained(state: GameState, trained: Any) -> GameState:
    """Inverse of `_trained`."""
    return state.replace(
        q_params=trained["params"], q_bounds=trained.get("bounds", state.q_bounds)
    )


def _read_bounds(ranges: Any, range_ema: str) -> Any:
    """The bounds (lo, hi) of observed ranges, for the optimizer to move."""
    return {name: quant.read_range(r, range_ema) for name, r in ranges.items()}


def first_bad(so_far: Array, step: Array, made: Any) -> Array:
    """The first step that made a number that is not finite, -1 where there is none.

    Args:
      so_far: the same of the steps before.
      step: this one's number.
      made: the tree that it made.
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
    """Makes one step of the game on a given batch.

    1. x = G(z, y), G's batch norms in training mode.
    2. p = P(x) with the statistics of its batch norms' inputs; q = Q(x).
    3. Adam step on G; the gradient reaches x through P and straight through Q.
    4. Nesterov step on Q, in `Phase.BOTH` only, on the same x and p as constants, and
       on the views of x, where there are some (not in the paper; G does not see them).

    While observing, Q runs a second time, so that the ranges move twice a step
    (released code). Once they are frozen, both forwards would give the same
    numbers: one serves both losses, by two cotangents through one vjp.

    Args:
      networks: of the game.
      generator_loss: G's loss; see `recipes.make_loss`.
      student_loss: Q's loss.
      g_optimizer: of G.
      q_optimizer: of Q.
      q_options: of Q.
      views: further terms of Q's loss, on images made of x.
      axis_name: mapped axis over which the global batch is split, or None.

    Returns:
      `play(state, teacher, batch, phase)` -> (state, metrics), with this device's
      share of a `Batch`. Metrics are scalars (H' quantiles: [5]) over the global batch,
      from before the update, `student` without views; `first_bad_step` is that of the
      new state.
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

    def run_q(state, teacher, phase, trained, images):
        state = _with_trained(state, trained)
        if phase is Phase.OBSERVE:
            state = state.replace(q_bounds={})
        q = q_variables(state, teacher, networks.q, q_options)
        if phase is Phase.OBSERVE:
            return players.q_observe(networks.q, q_options, q, images, axis_name)
        return players.q_logits(networks.q, q_options, q, images), state.q_ranges

    def loss_inputs(teacher, labels, p_logits, q_logits, bn_inputs):
        running = statistics(networks.p, teacher.variables)
        return LossInputs(p_logits, q_logits, labels, bn_inputs, running, axis_name)

    def view_loss(trained, value, state, teacher, images, batch):
        def apply_p(x):
            return run_p(teacher, x)[0]

        def apply_q(x):
            return run_q(state, teacher, Phase.BOTH, trained, x)[0]

        return value(apply_p, apply_q, images, batch)

    def train_q(state, grads):
        trained, opt_state = q_optimizer.update(
            mean_over(grads, axis_name),
            state.q_opt_state,
            _trained(state),
            state.step,
        )
        state = _with_trained(state, trained).replace(q_opt_state=opt_state)
        keep = q_options.average
        average = jax.tree.map(
            lambda a, b: keep * a + (1 - keep) * b,
            state.q_average,
            state.q_params if keep else {},
        )
        return state.replace(q_average=average)

    def play(state, teacher, batch, phase):
        labels = batch.labels
        trained = {"params": state.q_params}
        if phase is Phase.BOTH:
            trained = _trained(state)
        images, g_vjp, g_batch_stats = jax.vjp(
            functools.partial(run_g, state, batch), state.g_params, has_aux=True
        )
        (p_logits, bn_inputs), p_vjp = jax.vjp(
            functools.partial(run_p, teacher), images
        )
        q_logits, q_vjp, q_ranges = jax.vjp(
            functools.partial(run_q, state, teacher, phase),
            trained,
            images,
            has_aux=True,
        )
        chex.assert_equal_shape([p_logits, q_logits])

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
            q_again, q_ranges = run_q(moved, teacher, phase, trained, images)
        (q_loss, q_terms), q_bar = jax.value_and_grad(
            lambda q: student_loss(inputs(p_logits, q, bn_inputs)), has_aux=True
        )(q_again)
        state = state.replace(
            g_params=g_params,
            g_batch_stats=g_batch_stats,
            g_opt_state=g_opt_state,
            q_ranges=q_ranges,
        )
        if phase is Phase.OBSERVE and q_options.learn_ranges:
            bounds = _read_bounds(q_ranges, q_options.range_ema)
            state = state.replace(q_bounds=bounds)
        q_rate = jnp.zeros(())
        if phase is Phase.BOTH:
            q_grads, _ = q_vjp(q_bar)
            for view in views:
                q_terms[view.name], more = jax.value_and_grad(view_loss)(
                    trained, view.value, state, teacher, images, batch
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
        # Of the update as well: a gradient can fail where the losses still hold.
        made = (metrics, state.replace(step=(), first_bad_step=()))
        metrics["first_bad_step"] = first_bad(state.first_bad_step, state.step, made)
        state = state.replace(
            step=state.step + 1, first_bad_step=metrics["first_bad_step"]
        )
        return state, metrics

    return play


def _observations(p_logits, q_logits, labels, axis_name) -> dict[str, Array]:
    """What is worth watching but in no loss: H' and P's agreement with y."""
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
    """The state before the first step.

    Args:
      g_variables: fresh {'params', 'batch_stats'} of G.
      q_params: Q's parameters before the game, P's, by name.
      q_ranges: of its activations, see `players.init_ranges`.
      g_optimizer: of G.
      q_optimizer: of Q.
      q_options: of Q.
    """
    bounds = {}
    if q_options.learn_ranges:
        bounds = _read_bounds(q_ranges, q_options.range_ema)
    state = GameState(
        step=jnp.zeros((), jnp.int32),
        first_bad_step=jnp.full((), -1, jnp.int32),
        g_params=g_variables["params"],
        g_batch_stats=g_variables["batch_stats"],
        g_opt_state=g_optimizer.init(g_variables["params"]),
        q_params=q_params,
        q_ranges=q_ranges,
        q_opt_state=(),
        q_average=q_params if q_options.average else {},
        q_bounds=bounds,
    )
    return state.replace(q_opt_state=q_optimizer.init(_trained(state)))
