"""The two players' optimizers and their rates."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike


class Optimizer(NamedTuple):
    """An optax transformation of unit rate, and its rate at each step of the game.

    The rate is a function of the game's step and not of the number of updates,
    since Q starts later than G.
    """

    transform: optax.GradientTransformation
    rate: Callable[[Array], Array]

    def init(self, params: Any) -> Any:
        """The optimizer's state for a parameter tree."""
        return self.transform.init(params)

    def update(self, grads: Any, opt_state: Any, params: Any, step: Array):
        """One update: (new parameters, new optimizer state)."""
        with jax.numpy_dtype_promotion("standard"):  # optax: floats ** steps
            direction, opt_state = self.transform.update(grads, opt_state, params)
        rate = self.rate(step)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        return params, opt_state


def step_decay(
    base: float, drops: Sequence[int], factor: float = 0.1
) -> Callable[[Array], Array]:
    """Base * factor^(number of drops <= step), as a function of the step."""
    return between_drops(decayed(base, len(drops), factor), drops)


def decayed(base: float, drops: int, factor: float) -> np.ndarray:
    """Base * factor^n for n = 0 .. drops: float32 [drops + 1]."""
    # Decimal powers are taken here, so that the rate is the float32 nearest to
    # the written value and not a product of rounded ones.
    return np.asarray([base * factor**n for n in range(drops + 1)], np.float32)


def between_drops(rates: ArrayLike, drops: Sequence[int]) -> Callable[[Array], Array]:
    """Rates[number of drops <= step], as a function of the step.

    Args:
      rates: float32 [number of drops + 1]; may be traced.
      drops: steps.
    """

    def rate(step: Array) -> Array:
        passed = jnp.sum(jnp.asarray(step) >= jnp.asarray(sorted(drops), jnp.int32))
        return jnp.asarray(rates, jnp.float32)[passed]

    return rate


def generator_optimizer(rate: Callable[[Array], Array]) -> Optimizer:
    """Adam (0.5, 0.999), eps 1e-8, bias-corrected (released configuration)."""
    return Optimizer(optax.scale_by_adam(b1=0.5, b2=0.999, eps=1e-8), rate)


def student_optimizer(
    rate: Callable[[Array], Array],
    weight_decay: float,
    momentum: float = 0.9,
    decays: Callable[[tuple[Any, ...]], bool] = lambda path: True,
) -> Optimizer:
    """Nesterov SGD: d = g + w * p, v <- momentum * v + d, step = d + momentum * v.

    Args:
      rate: see `Optimizer`.
      weight_decay: w, before the momentum; on every parameter in the released
        configuration.
      momentum: of v.
      decays: of a tree path, whether w acts on the leaf.
    """

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)

    transform = optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.trace(decay=momentum, nesterov=True),
    )
    return Optimizer(transform, rate)
