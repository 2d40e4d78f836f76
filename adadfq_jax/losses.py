"""The losses of the two players, as pure functions of logits and statistics.

With logits p = P(x), q = Q(x) of [B, C] and H the Shannon entropy in nats:

    disagreement   softmax(p - q)      what only one of the two networks sees
    agreement      softmax(p + q)      what both see
    H'             entropy of the disagreement, normalised to [0, 1]

G keeps H' between two boundaries, so that its images are neither too easy nor
too hard for Q; Q raises H', that is, it removes the disagreement. Logits come
first and P's before Q's everywhere. `axis_name` is the mapped axis over which
the global batch is split, or None; every loss is then this device's share, whose
mean over devices is the loss.

Source: Qian et al., CVPR 2023 (arXiv 2303.06869), sections 3.2 to 3.4; where the
released code differs from the text, the code is followed and it is said.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class LossInputs(NamedTuple):
    """What a loss may look at.

    p_logits, q_logits: [B, C]. labels: the sampled classes, int32 [B].
    bn_inputs: mean and variance of the input of each batch norm of P, over the
    global batch; batch_stats: P's running ones, in the same structure. axis_name: the
    mapped axis of the global batch, or None.
    """

    p_logits: Array
    q_logits: Array
    labels: Array
    bn_inputs: Any = None
    batch_stats: Any = None
    axis_name: str | None = None


Loss = Callable[[LossInputs], tuple[Array, dict[str, Array]]]


def entropy_deficit(logits: Array) -> Array:
    """log C - H(softmax(logits)), in nats: [B, C] -> [B], in [0, log C].

    Near-equal logits (P against an 8-bit Q) would cancel in H, so that there it is
    the divergence from the uniform distribution, mean_c(r log r - r + 1) with
    r = C softmax(logits); where H itself is small, it is the difference as written.
    """
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    # log r, exactly 0 for equal logits, which log_softmax + log C need not be.
    log_r = shifted - jnp.log1p(jnp.mean(jnp.expm1(shifted), -1, keepdims=True))
    divergence = jnp.mean(_divergence_term(log_r), -1)
    log_probs = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
    difference = math.log(logits.shape[-1]) - entropy
    return jnp.where(divergence > 0.5, difference, divergence)


def _divergence_term(log_r: Array) -> Array:
    """r log r - r + 1 from log r; by its power series near 0, where it cancels."""
    near = jnp.abs(log_r) < 0.05
    # Each branch gets harmless values where the other holds: gradients see both.
    u = jnp.where(near, log_r, 0)
    v = jnp.where(near, 0, log_r)
    series = u * u * (1 / 2 + u * (1 / 3 + u * (1 / 8 + u * (1 / 30 + u / 144))))
    return jnp.where(near, series, v * jnp.exp(v) - jnp.expm1(v))


def normalised_entropy(
    p_logits: Array, q_logits: Array, axis_name: str | None = None
) -> Array:
    """H' of the disagreement, [B] in [0, 1]; the paper's adaptability is 1 - H'.

    H' = (H - min_b H) / (log C - min_b H), the minimum over the global batch and
    its gradient included (released code). With D = log C - H this is
    1 - D / max_b D. Where P and Q agree on every image (D = 0 throughout, the
    formula's 0/0) H' is 1 and its gradient 0.
    """
    deficit = entropy_deficit(p_logits - q_logits)
    everyone = deficit
    if axis_name is not None:
        everyone = jax.lax.all_gather(deficit, axis_name, tiled=True)
    largest = jnp.max(everyone)
    return 1 - deficit / jnp.where(largest > 0, largest, 1)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label], mean over the batch."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], -1))


def disagreement_loss(p_logits: Array, q_logits: Array, labels: Array) -> Array:
    """CE(softmax(p - q), y): G makes P, but not Q, see the label. Scalar."""
    return cross_entropy(p_logits - q_logits, labels)


def agreement_loss(p_logits: Array, q_logits: Array, labels: Array) -> Array:
    """CE(softmax(p + q), y): G makes P and Q together see the label. Scalar."""
    return cross_entropy(p_logits + q_logits, labels)


def margin_loss(
    p_logits: Array,
    q_logits: Array,
    lambda_l: float,
    lambda_u: float,
    axis_name: str | None = None,
) -> Array:
    """mean(max(lambda_l - H', 0)) + mean(max(H' - lambda_u, 0)): a scalar.

    Args:
      p_logits: [B, C].
      q_logits: [B, C].
      lambda_l: lower boundary of H', in [0, 1].
      lambda_u: upper boundary of H', in [0, 1].
      axis_name: mapped axis of the global batch, or None.
    """
    h = normalised_entropy(p_logits, q_logits, axis_name)
    return jnp.mean(jax.nn.relu(lambda_l - h)) + jnp.mean(jax.nn.relu(h - lambda_u))


def bn_stats_loss(bn_inputs: Any, batch_stats: Any) -> Array:
    """Distance of the batch's statistics from P's running ones: a scalar.

    For each batch norm the mean over channels of (mean - running mean)^2 plus
    that of (variance - running variance)^2; the mean over the layers. 0 of a network
    without batch norms.

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
    """T^2 * mean(log C - H(softmax((p - q) / T))): what Q minimises. Scalar.

    The released code's form of the other side of the game (the paper has
    E[1 - H']), neither normalised nor shifted by the batch's minimum; it minimises
    -T^2 * mean(H), which is this less the constant T^2 log C. 0 where Q agrees with P.
    """
    deficit = entropy_deficit((p_logits - q_logits) / temperature)
    return temperature**2 * jnp.mean(deficit)


def student_kl(p_logits: Array, q_logits: Array, temperature: float) -> Array:
    """T^2 * mean(KL(softmax(p / T) || softmax(q / T))): distillation. Scalar.

    The mean is over the batch; GDFQ as released averages over the classes as well.
    """
    log_p = jax.nn.log_softmax(p_logits / temperature)
    log_q = jax.nn.log_softmax(q_logits / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))
