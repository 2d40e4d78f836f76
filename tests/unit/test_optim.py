"""The optimizers against their formulas in float64 numpy."""

import jax
import numpy as np
import optax
import pytest

from adadfq_jax import optim

STEPS = 3


def _game(seed=0):
    """Parameters and one gradient for each step, with a bias among them."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (4, 3), "bias": (3,)}
    trees = [
        {k: rng.standard_normal(s) for k, s in shapes.items()} for _ in range(STEPS + 1)
    ]
    return trees[0], trees[1:]


def _run(optimizer, params, grads):
    params, grads = jax.tree.map(np.float32, (params, grads))
    found = []
    state = optimizer.init(params)
    for step, grad in enumerate(grads):
        params, state = optimizer.update(grad, state, params, step)
        found.append(params)
    return found


def _assert_same(found, expected):
    for tree, wanted in zip(found, expected, strict=True):
        for key in wanted:
            np.testing.assert_allclose(tree[key], wanted[key], rtol=2e-6, atol=1e-7)


def test_the_rate_drops_at_the_listed_steps():
    rate = optim.between_drops(optim.decayed(1e-4, 3, 0.1), (300, 100, 200))
    steps = [0, 99, 100, 199, 200, 299, 300, 10**6]
    expected = np.float32([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6, 1e-7, 1e-7])
    found = np.array([rate(np.int32(step)) for step in steps])
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert found.dtype == np.float32


def test_a_rate_without_drops_under_jit():
    rate = jax.jit(optim.between_drops(optim.decayed(0.1, 0, 0.1), ()))
    assert rate(np.int32(0)) == rate(np.int32(12345)) == np.float32(0.1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_student_is_nesterov_with_decay_before_momentum(weight_decay):
    params, grads = _game()
    optimizer = optim.student_optimizer(
        optax.piecewise_constant_schedule(0.1, {2: 0.1}), weight_decay
    )
    expected, velocity = [], jax.tree.map(np.zeros_like, params)
    now = params
    for step, grad in enumerate(grads):
        # On every parameter, the bias included; no dampening.
        grad = {k: grad[k] + weight_decay * now[k] for k in now}
        velocity = {k: 0.9 * velocity[k] + grad[k] for k in now}
        rate = 0.1 if step < 2 else 0.01
        now = {k: now[k] - rate * (grad[k] + 0.9 * velocity[k]) for k in now}
        expected.append(now)
    _assert_same(_run(optimizer, params, grads), expected)


def test_generator_is_bias_corrected_adam():
    params, grads = _game(1)
    optimizer = optim.generator_optimizer(optax.constant_schedule(1e-2))
    first = jax.tree.map(np.zeros_like, params)
    second, now, expected = first, params, []
    for n, grad in enumerate(grads, 1):
        first = {k: 0.5 * first[k] + 0.5 * grad[k] for k in now}
        second = {k: 0.999 * second[k] + 0.001 * grad[k] ** 2 for k in now}
        now = {
            k: now[k]
            - 1e-2
            * (first[k] / (1 - 0.5**n))
            / (np.sqrt(second[k] / (1 - 0.999**n)) + 1e-8)
            for k in now
        }
        expected.append(now)
    _assert_same(_run(optimizer, params, grads), expected)


def test_rate_follows_the_step_of_the_game_not_the_number_of_updates():
    # Q starts late: its first update comes at a step after the drop.
    rate = optax.piecewise_constant_schedule(1.0, {50: 0.1})
    optimizer = optim.student_optimizer(rate, 0.0, 0.0)
    params = {"kernel": np.ones(2, np.float32)}
    moved, _ = optimizer.update(params, optimizer.init(params), params, 50)
    np.testing.assert_allclose(moved["kernel"], 0.9, rtol=1e-6)
