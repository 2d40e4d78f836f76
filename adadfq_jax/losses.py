"""The losses of the two players, as pure functions of logits and statistics.

With logits p = P(x), q = Q(x) of [B, C] and H the Shannon entropy in nats:

    disagreement   softmax(p - q)      what only one of the two networks sees
    agreement      softmax(p + q)      what both see
    H'             entropy of the disagreement, normalised to [0, 1]

G keeps H' between two boundaries, so that its images are neither too easy nor too hard
for Q. Q raises H', that is, it removes the disagreement. Every loss takes the logits
first, P's before Q's. `axis_name` is the mapped axis over which the global batch is
split, or None. Each device computes its share of a loss; the mean over the devices is
the loss.

Source: Qian et al., CVPR 2023 (arXiv 2303.06869), sections 3.2 to 3.4. Where the
released code differs from the text, the code is followed and the docstring says so.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class LossInputs(NamedTuple):
    """The inputs of a loss.

    Attributes:
      p_logits: P's logits [B, C].
      q_logits: Q's logits [B, C].
      labels: the sampled classes, int32 [B].
      bn_inputs: mean and variance of the input of each batch norm of P, over the global
        batch.
      batch_stats: P's running means and variances, in the structure of `bn_inputs`.
      axis_name: mapped axis over which the global batch is split, or None.
    """

    p_logits: Array
    q_logits: Array
    labels: Array
    bn_inputs: Any = None
    batch_stats: Any = None
    axis_name: str | None = None


Loss = Callable[[LossInputs], tuple[Array, dict[str, Array]]]


def entropy_deficit(logits: Array) -> Array:
    """Compute log C - H(softmax(logits)) in nats: [B, C] -> [B], in [0, log C].

    Near-equal logits (P against an 8-bit Q) would lose their digits in the difference.
    There the result is computed as the equal divergence from the uniform distribution,
    mean_c(r log r - r + 1) with r = C softmax(logits). Where that divergence is large,
    the result is the difference as written.
    """
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    # This log r is exactly 0 for equal logits; log_softmax + log C need not be.
    log_r = shifted - jnp.log1p(jnp.mean(jnp.expm1(shifted), -1, keepdims=True))
    divergence = jnp.mean(_divergence_term(log_r), -1)
    log_probs = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
    difference = math.log(logits.shape[-1]) - entropy
    return jnp.where(divergence > 0.5, difference, divergence)


def _divergence_term(log_r: Array) -> Array:
    """Compute r log r - r + 1 from log r, by its power series where log r is near 0."""
    near = jnp.abs(log_r) < 0.05
    # Gradients pass through both branches, so each gets 0 where the other one counts.
    u = jnp.where(near, log_r, 0)
    v = jnp.where(near, 0, log_r)
    series = u * u * (1 / 2 + u * (1 / 3 + u * (1 / 8 + u * (1 / 30 + u / 144))))
    return jnp.where(near, series, v * jnp.exp(v) - jnp.expm1(v))


def normalised_entropy(
    p_logits: Array, q_logits: Array, axis_name: str | None = None
) -> Array:
    """Compute H', which is 1 minus the paper's adaptability: [B] in [0, 1].

    H' = (H - min_b H) / (log C - min_b H). The minimum is over the global batch, and
    the gradient passes through it (released code). With D = log C - H this is
    H' = 1 - D / max_b D. Where P and Q agree on every image, D is 0 everywhere and the
    formula is 0/0; there H' is 1 and its gradient is 0.
    """
    deficit = entropy_deficit(p_logits - q_logits)
    everyone = deficit
    if axis_name is not None:
        everyone = jax.lax.all_gather(deficit, axis_name, tiled=True)
    largest = jnp.max(everyone)
    return 1 - deficit / jnp.where(largest > 0, largest, 1)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Compute the mean of -log softmax(logits)[label] over the batch."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], -1))


def disagreement_loss(p_logits: Array, q_logits: Array, labels: Array) -> Array:
    """Compute CE(softmax(p - q), y), a scalar: G makes P, but not Q, see the label."""
    return cross_entropy(p_logits - q_logits, labels)


def agreement_loss(p_logits: Array, q_logits: Array, labels: Array) -> Array:
    """Compute CE(softmax(p + q), y), a scalar: G makes P and Q both see the label."""
    return cross_entropy(p_logits + q_logits, labels)


def margin_loss(
    p_logits: Array,
    q_logits: Array,
    lambda_l: float,
    lambda_u: float,
    axis_name: str | None = None,
) -> Array:
    """Compute mean(max(lambda_l - H', 0)) + mean(max(H' - lambda_u, 0)), a scalar.

    Args:
      p_logits: [B, C].
      q_logits: [B, C].
      lambda_l: lower boundary of H', in [0, 1].
      lambda_u: upper boundary of H', in [0, 1].
      axis_name: mapped axis over which the global batch is split, or None.
    """
    h = normalised_entropy(p_logits, q_logits, axis_name)
    return jnp.mean(jax.nn.relu(lambda_l - h)) + jnp.mean(jax.nn.relu(h - lambda_u))


def bn_stats_loss(bn_inputs: Any, batch_stats: Any) -> Array:
    """Compute the distance of the batch's statistics from P's running ones, a scalar.

    The distance of a batch norm is (mean - running mean)^2 + (variance - running
    variance)^2, averaged over the channels. The result is the mean over the batch
    norms, and 0 for a network without batch norms.

    Args:
      bn_inputs: tree with leaves 'mean' and 'var' for each layer, biased variance.
      batch_stats: P's running statistics in the same structure.
    """
    errors = jax.tree.map(
        lambda a, b: jnp.mean(jnp.square(a - b)), bn_inputs, batch_stats
    )
    leaves = jax.tree.leaves(errors)
    if not leaves:
        return jnp.zeros(())
    return 2 * jnp.mean(jnp.stack(leaves))  # a layer is two leaves


def student_gap(p_logits: Array, q_logits: Array, temperature: float) -> Array:
    """Compute Q's loss T^2 * mean(log C - H(softmax((p - q) / T))), a scalar.

    The entropy is neither normalised nor shifted by the batch's minimum, as in the
    released code; the paper has E[1 - H']. The released code minimises -T^2 * mean(H),
    which is this loss minus the constant T^2 log C. The loss is 0 if Q agrees with P.
    """
    deficit = entropy_deficit((p_logits - q_logits) / temperature)
    return temperature**2 * jnp.mean(deficit)


def student_kl(p_logits: Array, q_logits: Array, temperature: float) -> Array:
    """Compute T^2 * mean(KL(softmax(p / T) || softmax(q / T))), a distillation loss.

    The mean is over the batch; the released code of GDFQ also averages over the
    classes. The result is a scalar.
    """
    log_p = jax.nn.log_softmax(p_logits / temperature)
    log_q = jax.nn.log_softmax(q_logits / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))
