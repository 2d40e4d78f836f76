"""The two players' optimizers and their rates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike


class Optimizer(NamedTuple):
    """An optax transformation of unit rate, and its rate at each step of the game.

    Attributes:
      transform: the transformation; its updates are multiplied by the rate.
      rate: the rate, of the step of the game. The number of updates would not do, since
        Q starts to train later than G.
    """

    transform: optax.GradientTransformation
    rate: optax.Schedule

    def init(self, params: Any) -> Any:
        """Make the optimizer's state for a parameter tree."""
        return self.transform.init(params)

    def update(self, grads: Any, opt_state: Any, params: Any, step: Array):
        """Take one step and return the new parameters and optimizer state."""
        # optax takes floats to the power of steps, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            direction, opt_state = self.transform.update(grads, opt_state, params)
        rate = self.rate(step)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        return params, opt_state


def decayed(base: float, drops: int, factor: float) -> np.ndarray:
    """Compute base * factor^n for n = 0 .. drops: float32 [drops + 1]."""
    # The powers are taken in float64, so that the rate is the float32 nearest to the
    # written value and not a product of rounded numbers.
    return np.asarray([base * factor**n for n in range(drops + 1)], np.float32)


def between_drops(rates: ArrayLike, drops: Sequence[int]) -> optax.Schedule:
    """Make the rate rates[number of drops <= step], a function of the step.

    optax's schedules take no rates that are traced, as those of a population are.

    Args:
      rates: float32 [number of drops + 1]; may be traced.
      drops: the steps at which the rate drops.
    """

    def rate(step: Array) -> Array:
        passed = jnp.sum(jnp.asarray(step) >= jnp.asarray(sorted(drops), jnp.int32))
        return jnp.asarray(rates, jnp.float32)[passed]

    return rate


def generator_optimizer(rate: optax.Schedule) -> Optimizer:
    """Make G's Adam: betas 0.5 and 0.999, eps 1e-8, bias-corrected (released code)."""
    return Optimizer(optax.scale_by_adam(b1=0.5, b2=0.999, eps=1e-8), rate)


def student_optimizer(
    rate: optax.Schedule,
    weight_decay: float,
    momentum: float = 0.9,
) -> Optimizer:
    """Make Q's SGD with Nesterov momentum.

    d = g + w * p, v <- momentum * v + d, step = d + momentum * v, for a parameter p and
    its gradient g.

    Args:
      rate: see `Optimizer`.
      weight_decay: w; it acts before the momentum, on every parameter as in the
        released code.
      momentum: decay of v.
    """
    transform = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum, nesterov=True),
    )
    return Optimizer(transform, rate)
