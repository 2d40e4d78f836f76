"""Evaluation: padding, masking, normalisation and several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import evaluation
from adadfq_jax.evaluation.evaluator import Evaluator, normalise
from tests.helpers import pixels_as_logits


def random_set(n=37):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 2, 2, 1), np.uint8)
    labels = rng.integers(0, 4, n).astype(np.int32)
    return evaluation.EvalSet(images, labels)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [4, 10, 64])
def test_top1_counts_every_image_once(devices, batch_size):
    eval_set = random_set()
    brightest = eval_set.images.reshape(37, 4).argmax(-1)
    expected = 100 * (brightest == eval_set.labels).mean()
    evaluator = Evaluator(
        pixels_as_logits,
        eval_set,
        mean=(0.5,),
        std=(0.25,),
        batch_size=batch_size,
        devices=jax.devices()[:devices],
    )
    assert evaluator.top1(jnp.float32(1)) == pytest.approx(expected)


def test_agreement_counts_equal_classes_instead_of_labels():
    eval_set = random_set()
    flat = eval_set.images.reshape(37, 4)
    factors = np.arange(1, 5, dtype=np.float32)[None]
    evaluator = Evaluator(
        pixels_as_logits,
        eval_set,
        mean=(0.5,),
        std=(0.25,),
        batch_size=10,
        devices=jax.devices()[:2],
        reference=lambda variables, x: pixels_as_logits(variables, x) * factors,
    )
    other = ((flat / 255 - 0.5) / 0.25 * factors).argmax(-1)
    expected = 100 * (flat.argmax(-1) == other).mean()
    assert 0 < expected < 100
    assert evaluator.top1(jnp.float32(1)) == pytest.approx(expected)


def test_padding_is_masked_and_order_is_kept():
    batches = list(evaluation.batches(random_set(), 10))
    assert [b.images.shape for b in batches] == [(10, 2, 2, 1)] * 4
    assert sum(b.mask.sum() for b in batches) == 37
    labels = np.concatenate([b.labels[b.mask > 0] for b in batches])
    np.testing.assert_array_equal(labels, random_set().labels)


def test_normalise_by_hand():
    images = np.asarray([[[0, 255]]], np.uint8)
    out = normalise(jnp.asarray(images), (0.5, 0.25), (0.5, 0.25))
    np.testing.assert_allclose(out, [[[-1.0, 3.0]]])
