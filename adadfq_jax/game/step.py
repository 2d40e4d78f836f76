"""One step of the two-player game, as a pure function.

G makes images that suit Q, Q learns from P on them. The step is a function of
(state, P's variables, key); networks, losses and optimizers are arguments of the
factory. P is an argument of the step: it is neither state nor compiled in.
"""

import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax import losses, quant
from adadfq_jax.game import framing
from adadfq_jax.game.collectives import global_moments, mean_over
from adadfq_jax.losses import LossInputs
from adadfq_jax.optim import Optimizer

CLIP_RATIOS = "clip_ratios"  # the collection beside P's variables
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


class QOptions(NamedTuple):
    """How Q is quantized and trained, beside its network.

    weight_bits: bits of the kernels, None for a Q that is not quantized.
    weight_range: of a kernel's channel, see `quant.kernel_shrinks`.
    range_ema: how the activation ranges are read, see `quant.read_range`.
    learn_ranges: whether they train with Q's parameters.
    average: decay of the average of Q's parameters, 0 for none.
    layer_bits: of the kernels that have others, by name, see `quant.quantize_kernels`.
    """

    weight_bits: int | None
    weight_range: str = "minmax"
    range_ema: str = "corrected"
    learn_ranges: bool = False
    average: float = 0.0
    layer_bits: Mapping[str, int] = quant.NO_LAYERS


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
    """Linen `apply` functions: `apply(variables, *inputs, mutable=[...])`.

    P and Q are the same module, Q with activation quantizers.
    """

    g_apply: Callable[..., Any]
    p_apply: Callable[..., Any]
    q_apply: Callable[..., Any]


def q_variables(state: GameState, p_variables: Any, options: QOptions) -> Any:
    """What Q's `apply` takes: fake-quantized kernels, P's statistics, ranges.

    Args:
      state: of the game.
      p_variables: see `with_clip_ratios`.
      options: of Q.
    """
    params = quant.quantize_kernels(
        state.q_params,
        options.weight_bits,
        p_variables.get(CLIP_RATIOS, {}),
        options.layer_bits,
    )
    return {
        "params": params,
        "batch_stats": p_variables["batch_stats"],
        "ranges": final_ranges(state),
    }


def with_clip_ratios(p_variables: Any, options: QOptions) -> Any:
    """P's variables, and beside them the clip ratios of Q's kernels, chosen on P's.

    They are the same for the whole game: the step takes them with P's variables, as
    an argument that never changes. P's `apply` passes over them.

    Args:
      p_variables: {'params': ..., 'batch_stats': ...}.
      options: of Q.
    """
    ratios = quant.kernel_shrinks(
        p_variables["params"],
        options.weight_bits,
        options.weight_range,
        options.layer_bits,
    )
    return {**p_variables, CLIP_RATIOS: ratios}


def final_ranges(state: GameState) -> Any:
    """The activation ranges that Q quantizes with: the learned ones, or averages."""
    if not state.q_bounds:
        return state.q_ranges
    return jax.tree.map(
        lambda r, bounds: quant.fixed_range(*bounds),
        state.q_ranges,
        state.q_bounds,
        is_leaf=_is_range,
    )


def to_deploy(state: GameState) -> GameState:
    """The state with the Q that counts: its average, where one is kept."""
    return state.replace(q_params=state.q_average) if state.q_average else state


def _is_range(node: Any) -> bool:
    return isinstance(node, quant.RangeState)


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
    return jax.tree.map(
        lambda r: quant.read_range(r, range_ema), ranges, is_leaf=_is_range
    )


def _is_finite(tree: Any) -> Array:
    """Whether every number of a tree is finite: a boolean scalar."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


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
      networks: the three `apply` functions.
      generator_loss: G's loss; see `recipes.make_loss`.
      student_loss: Q's loss.
      g_optimizer: of G.
      q_optimizer: of Q.
      q_options: of Q.
      views: further terms of Q's loss, on images made of x.
      axis_name: mapped axis over which the global batch is split, or None.

    Returns:
      `play(state, p_variables, batch, phase)` -> (state, metrics), with this device's
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

    def run_p(p_variables, images):
        logits, updates = networks.p_apply(p_variables, images, mutable=["bn_inputs"])
        return logits, global_moments(updates["bn_inputs"], axis_name)

    def run_q(state, p_variables, phase, trained, images):
        state = _with_trained(state, trained)
        if phase is Phase.OBSERVE:
            state = state.replace(q_bounds={})
        variables = q_variables(state, p_variables, q_options)
        if phase is not Phase.OBSERVE:
            return networks.q_apply(variables, images), state.q_ranges
        logits, updates = networks.q_apply(variables, images, mutable=["ranges"])
        return logits, updates.get("ranges", {})

    def loss_inputs(p_variables, labels, p_logits, q_logits, bn_inputs):
        running = p_variables["batch_stats"]
        return LossInputs(p_logits, q_logits, labels, bn_inputs, running, axis_name)

    def view_loss(trained, value, state, p_variables, images, batch):
        def apply_p(x):
            return run_p(p_variables, x)[0]

        def apply_q(x):
            return run_q(state, p_variables, Phase.BOTH, trained, x)[0]

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

    def play(state, p_variables, batch, phase):
        labels = batch.labels
        trained = {"params": state.q_params}
        if phase is Phase.BOTH:
            trained = _trained(state)
        images, g_vjp, g_batch_stats = jax.vjp(
            functools.partial(run_g, state, batch), state.g_params, has_aux=True
        )
        (p_logits, bn_inputs), p_vjp = jax.vjp(
            functools.partial(run_p, p_variables), images
        )
        q_logits, q_vjp, q_ranges = jax.vjp(
            functools.partial(run_q, state, p_variables, phase),
            trained,
            images,
            has_aux=True,
        )
        chex.assert_equal_shape([p_logits, q_logits])

        inputs = functools.partial(loss_inputs, p_variables, labels)

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
            q_again, q_ranges = run_q(moved, p_variables, phase, trained, images)
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
                    trained, view.value, state, p_variables, images, batch
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
        bad = ~_is_finite((metrics, state.replace(step=(), first_bad_step=())))
        first = jnp.where(bad & (state.first_bad_step < 0), state.step, -1)
        metrics["first_bad_step"] = jnp.maximum(state.first_bad_step, first)
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
    q_init: Any,
    g_optimizer: Optimizer,
    q_optimizer: Optimizer,
    q_options: QOptions,
) -> GameState:
    """The state before the first step.

    Args:
      g_variables: fresh {'params', 'batch_stats'} of G.
      q_init: {'params', 'ranges'}: P's parameters and unobserved ranges.
      g_optimizer: of G.
      q_optimizer: of Q.
      q_options: of Q.
    """
    q_ranges = q_init.get("ranges", {})
    bounds = {}
    if q_options.learn_ranges:
        bounds = _read_bounds(q_ranges, q_options.range_ema)
    state = GameState(
        step=jnp.zeros((), jnp.int32),
        first_bad_step=jnp.full((), -1, jnp.int32),
        g_params=g_variables["params"],
        g_batch_stats=g_variables["batch_stats"],
        g_opt_state=g_optimizer.init(g_variables["params"]),
        q_params=q_init["params"],
        q_ranges=q_ranges,
        q_opt_state=(),
        q_average=q_init["params"] if q_options.average else {},
        q_bounds=bounds,
    )
    return state.replace(q_opt_state=q_optimizer.init(_trained(state)))
