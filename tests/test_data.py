"""The embedded evaluation set through TFDS, and missing data."""

import numpy as np
import pytest

from adadfq_jax import config, data
from adadfq_jax.errors import InputError


def test_the_embedded_set_is_fashion_mnists_test_split():
    eval_set = data.load("fashion_mnist", str(config.ASSETS), "test")
    assert eval_set.images.shape == (10_000, 28, 28, 1)
    assert eval_set.images.dtype == np.uint8
    assert np.bincount(eval_set.labels).tolist() == [1000] * 10
    # The original archive starts with these labels; its mean is 0.2868.
    assert eval_set.labels[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]
    assert eval_set.images.mean() / 255 == pytest.approx(0.2868, abs=1e-4)


@pytest.mark.parametrize("dataset", ["fashion_mnist", "no_such_data_set"])
def test_unprepared_data_is_refused_with_the_ways_out(tmp_path, dataset):
    with pytest.raises(InputError, match=r"eval\.data_dir") as caught:
        data.load(dataset, str(tmp_path), "test")
    assert dataset in str(caught.value)
    assert "config.eval.enabled=False" in str(caught.value)
