"""The losses: recorded values and gradients, edges, and a batch split over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from adadfq_jax import losses
from tests import helpers
from tests.golden.fill import labels, noise

GOLDEN = helpers.load_npz("losses")
CASES = [f"{classes}_{i}_" for classes in (10, 100) for i in range(4)]
BOUNDARIES = [(0.1, 0.8), (0.4, 0.8), (0.3, 0.6)]
# Of the largest element. The recorded gradients are themselves up to 3.8e-6 away from
# the same formulas in float64, the recorded values up to 5e-7.
TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6

# Compiled once for each shape.
entropy_deficit = jax.jit(losses.entropy_deficit)
normalised_entropy = jax.jit(losses.normalised_entropy)
margin_and_gradients = jax.jit(jax.value_and_grad(losses.margin_loss, (0, 1)))
gap_and_gradient = jax.jit(jax.value_and_grad(losses.student_gap, 1))
BALANCES = {
    "disagreement": jax.jit(losses.disagreement_loss),
    "agreement": jax.jit(losses.agreement_loss),
}


def recorded(case):
    y = GOLDEN[f"{case}labels"].astype(np.int32)
    return GOLDEN[f"{case}p_logits"], GOLDEN[f"{case}q_logits"], y


def logits(classes, scale=1.0, batch=16):
    """Logits of P, Q and labels; Q's differ from P's by `scale`."""
    p = noise("p", (batch, classes))
    q = p + np.float32(scale) * noise("d", (batch, classes))
    return p, q, labels("y", batch, classes)


def reference_entropy(difference):
    """H' and its deficit log C - H in float64, without cancellation."""
    x = np.float64(difference)
    x = x - x.max(-1, keepdims=True)
    r = x - np.log1p(np.expm1(x).mean(-1, keepdims=True))  # log(C softmax(x))
    series = r**2 / 2 + r**3 / 3 + r**4 / 8
    terms = np.where(np.abs(r) < 1e-3, series, r * np.exp(r) - np.expm1(r))
    deficit = terms.mean(-1)
    return 1 - deficit / deficit.max(), deficit


@pytest.mark.parametrize("case", CASES)
def test_recorded_entropy(case):
    p, q, _ = recorded(case)
    found = np.log(p.shape[1]) - np.asarray(entropy_deficit(p - q))
    helpers.assert_close(found, GOLDEN[f"{case}entropy"], TOLERANCE)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("case", CASES)
def test_recorded_margin(case, boundaries):
    p, q, _ = recorded(case)
    key = f"{case}margin_{boundaries[0]}_{boundaries[1]}"
    value, (by_p, by_q) = margin_and_gradients(p, q, *boundaries)
    helpers.assert_close(value, GOLDEN[key], TOLERANCE)
    helpers.assert_close(by_p, GOLDEN[f"{key}_dp"], GRADIENT_TOLERANCE)
    helpers.assert_close(by_q, GOLDEN[f"{key}_dq"], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", BALANCES)
@pytest.mark.parametrize("case", CASES)
def test_recorded_balance(case, name):
    found = BALANCES[name](*recorded(case))
    helpers.assert_close(found, GOLDEN[f"{case}{name}"], TOLERANCE)


@pytest.mark.parametrize("temperature", [20, 5])
@pytest.mark.parametrize("case", CASES)
def test_recorded_student(case, temperature):
    p, q, _ = recorded(case)
    key = f"{case}student_T{temperature}"
    value, by_q = gap_and_gradient(p, q, float(temperature))
    constant = temperature**2 * np.log(p.shape[-1])  # the record's zero is elsewhere
    helpers.assert_close(float(value) - constant, GOLDEN[key], TOLERANCE)
    helpers.assert_close(by_q, GOLDEN[f"{key}_dq"], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("temperature", [20.0, 5.0])
def test_student_gap_is_what_the_entropy_lacks(temperature):
    p, q, _ = logits(10)
    gap = losses.student_gap(p, q, temperature)
    _, deficit = reference_entropy((p - q) / np.float32(temperature))
    assert float(gap) == pytest.approx(temperature**2 * deficit.mean(), rel=1e-4)


def all_losses(p, q, y):
    """Every loss of logits, with boundaries that both can be active."""
    return {
        "margin": losses.margin_loss(p, q, 0.3, 0.5),
        "disagreement": losses.disagreement_loss(p, q, y),
        "agreement": losses.agreement_loss(p, q, y),
        "student_kl": losses.student_kl(p, q, 20.0),
        "student_gap": losses.student_gap(p, q, 20.0),
    }


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("classes", [2, 7, 10, 100, 1000])
def test_equal_logits_give_full_entropy_and_finite_gradients(classes, jit):
    p, _, y = logits(classes)
    compiled = jax.jit if jit else (lambda f: f)
    found = compiled(all_losses)(p, p, y)
    assert float(found["student_gap"]) == pytest.approx(0, abs=1e-9)
    assert float(found["disagreement"]) == pytest.approx(np.log(classes), rel=1e-6)

    def together(p, q):  # its gradients are finite only if those of each are
        return sum(all_losses(p, q, y).values())

    for gradient in compiled(jax.grad(together, (0, 1)))(p, p):
        assert np.isfinite(gradient).all()
    # The formula's 0/0 reads as 1.
    np.testing.assert_array_equal(compiled(losses.normalised_entropy)(p, p), 1)
    assert float(found["margin"]) == pytest.approx(1 - 0.5, rel=1e-6)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4, 1e-6])
def test_tiny_differences_match_float64(classes, scale):
    # P against an 8-bit Q. The difference itself is exact here: p is 0.
    difference = np.float32(scale) * noise("tiny", (16, classes))
    expected, deficit = reference_entropy(difference)
    for entropy in (losses.normalised_entropy, normalised_entropy):
        found = entropy(difference, np.zeros_like(difference))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    found = losses.entropy_deficit(difference)
    np.testing.assert_allclose(found, deficit, rtol=2e-6)


def test_normalised_entropy_spans_the_batch():
    p, q, _ = logits(10)
    h = np.asarray(normalised_entropy(p, q))
    expected, _ = reference_entropy(p - q)
    np.testing.assert_allclose(h, expected, atol=1e-6)
    assert h.min() == 0 and h.max() < 1


@pytest.mark.parametrize(
    "name", ["margin", "disagreement", "agreement", "student_kl", "student_gap"]
)
def test_gradients_match_differences(name):
    p, q, y = logits(10, scale=0.7, batch=5)
    # Images below, between and above the boundaries, clear of the kinks.
    h = np.sort(normalised_entropy(p, q))
    assert (np.abs(h[:, None] - [0.3, 0.5]) > 0.03).all(), h
    assert h[0] == 0 and h[1] < 0.3 < h[3] < 0.5 < h[4]
    check_grads(
        jax.jit(lambda p, q: all_losses(p, q, y)[name]),
        (p, q),
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
        eps=1e-2,
    )


@pytest.mark.parametrize("devices", [2, 8])
def test_margin_of_a_split_batch_is_that_of_the_whole(devices):
    p, q, _ = logits(10)
    # The strongest disagreement lies in one share only: a minimum taken per device
    # would differ.
    q[0] += 3 * noise("strong", (10,))
    whole, by_whole = margin_and_gradients(p, q, 0.4, 0.8)
    split = functools.partial(
        losses.margin_loss, lambda_l=0.4, lambda_u=0.8, axis_name="batch"
    )

    def mean_of_shares(p, q):
        shares = (x.reshape(devices, -1, 10) for x in (p, q))
        return jnp.mean(jax.vmap(split, axis_name="batch")(*shares))

    value, by_split = jax.jit(jax.value_and_grad(mean_of_shares, (0, 1)))(p, q)
    helpers.assert_close(value, whole, 1e-6)
    for found, expected in zip(by_split, by_whole, strict=True):
        helpers.assert_close(found, expected, 1e-6)
    # That the case can tell: without the axis each share takes its own minimum.
    alone = functools.partial(losses.margin_loss, lambda_l=0.4, lambda_u=0.8)
    shares = [x.reshape(devices, -1, 10) for x in (p, q)]
    assert abs(np.mean(jax.jit(jax.vmap(alone))(*shares)) - float(whole)) > 1e-2


def test_bn_statistics_by_hand():
    found = {"a": {"mean": np.float32([1, 3]), "var": np.float32([2, 2])}}
    running = {"a": {"mean": np.float32([0, 1]), "var": np.float32([1, 0])}}
    assert float(losses.bn_stats_loss(found, running)) == (1 + 4) / 2 + (1 + 4) / 2
    # Layers count alike, whatever their width.
    found["b"] = {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32)}
    running["b"] = {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32)}
    assert float(losses.bn_stats_loss(found, running)) == 5 / 2


def test_student_kl_by_hand_and_to_second_order_the_gap():
    p, q = np.log(np.float32([[0.5, 0.5]])), np.log(np.float32([[0.2, 0.8]]))
    expected = 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8)
    assert float(losses.student_kl(p, q, 1.0)) == pytest.approx(expected, rel=1e-5)
    # At a high temperature both are the variance of (p - q) over the classes, halved.
    p, q, _ = logits(10)
    variance = np.mean(np.var(p - q, -1)) / 2
    for loss in (losses.student_kl, losses.student_gap):
        assert float(loss(p, q, 100.0)) == pytest.approx(variance, rel=5e-2)
