"""The reference step of the benchmark: the game in plain JAX, on one device.

It has two forward passes of Q (and one on framed images), nearest upsampling and then a
3x3 convolution, XLA's convolutions alone, and one `jax.grad` per player. It is jitted
without donated buffers. It must not change, because figures are ratios to its time.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adadfq_jax import game
from adadfq_jax.game import GameState, Phase, framing, players
from adadfq_jax.losses import LossInputs
from adadfq_jax.models.convolution import lax_conv
from adadfq_jax.models.layers import Conv, UpsampleConv
from adadfq_jax.network import statistics
from adadfq_jax.training.build import GameParts


def _plain_convolutions(call, args, kwargs, context):
    """Replace each convolution by XLA's, with any upsampling before it (Flax hook)."""
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, Conv | UpsampleConv):
        return call(*args, **kwargs)
    x, kernel = args[0], module.get_variable("params", "kernel")
    if isinstance(module, UpsampleConv):
        y = lax_conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), kernel)
    else:
        y = lax_conv(x, kernel, module.stride)
    if module.has_variable("params", "bias"):
        y = y + module.get_variable("params", "bias")
    return y


def make_reference_step(
    parts: GameParts, draw: Callable[..., Any], framed_weight: float = 0.0
) -> Callable[..., tuple[GameState, dict[str, jax.Array]]]:
    """Make step(state, teacher, key, phase) -> (state, losses by name).

    The step takes the same states and draws the same batches as the step of
    `rollout.make_game_step`.
    """
    networks = parts.networks

    def run_p(teacher, images):
        images = images.astype(networks.p.dtype)
        return players.p_forward(networks.p, teacher.variables, images, None)

    def run_q(state, teacher, images, phase):
        graph, options = networks.q, parts.q_options
        q = game.q_variables(state, teacher, graph, options)
        if phase is not Phase.OBSERVE:
            return players.q_logits(graph, options, q, images, None), state.q_ranges
        return players.q_observe(graph, options, q, images, None, None)

    def play(state, teacher, key, phase):
        latents, labels, frames = draw(jax.random.fold_in(key, state.step))

        def inputs(p_logits, q_logits, bn_inputs, labels=labels):
            running = statistics(networks.p, teacher.variables)
            return LossInputs(p_logits, q_logits, labels, bn_inputs, running)

        def g_value(g_params):
            variables = {"params": g_params, "batch_stats": state.g_batch_stats}
            images, moved = networks.g_apply(
                variables, latents, labels, mutable=["batch_stats"]
            )
            p_logits, stored = run_p(teacher, images)
            q_logits, ranges = run_q(state, teacher, images, phase)
            seen = inputs(p_logits, q_logits, stored)
            value, _ = parts.generator_loss(seen)
            return value, (images, p_logits, stored, moved, ranges)

        (g_loss, made), g_grads = jax.value_and_grad(g_value, has_aux=True)(
            state.g_params
        )
        images, p_logits, bn_inputs, moved, ranges = made
        g_params, g_opt_state = parts.g_optimizer.update(
            g_grads, state.g_opt_state, state.g_params, state.step
        )
        state = state.replace(
            g_params=g_params,
            g_opt_state=g_opt_state,
            g_batch_stats=moved["batch_stats"],
            q_ranges=ranges,
        )

        def q_value(q_params):
            q_logits, ranges = run_q(
                state.replace(q_params=q_params), teacher, images, phase
            )
            value, _ = parts.student_loss(inputs(p_logits, q_logits, bn_inputs))
            total, weight = value, framed_weight
            if phase is Phase.BOTH and weight:
                total += weight * framed_value(q_params)
            return total, (value, ranges)

        def framed_value(q_params):
            every_second = jax.tree.map(lambda leaf: leaf[::2], frames)
            framed = framing.put_in_frames(images[::2], every_second)
            p_logits, stored = run_p(teacher, framed)
            q_logits, _ = run_q(
                state.replace(q_params=q_params), teacher, framed, phase
            )
            seen = inputs(p_logits, q_logits, stored, labels[::2])
            return parts.student_loss(seen)[0]

        if phase is Phase.BOTH:
            q_grads, (q_loss, ranges) = jax.grad(q_value, has_aux=True)(state.q_params)
            q_params, q_opt_state = parts.q_optimizer.update(
                q_grads, state.q_opt_state, state.q_params, state.step
            )
            state = state.replace(q_params=q_params, q_opt_state=q_opt_state)
        else:
            _, (q_loss, ranges) = q_value(state.q_params)
        state = state.replace(step=state.step + 1, q_ranges=ranges)
        return state, {"generator": g_loss, "student": q_loss}

    def step(state, teacher, key, phase):
        with nn.intercept_methods(_plain_convolutions):
            return play(state, teacher, key, phase)

    return step
