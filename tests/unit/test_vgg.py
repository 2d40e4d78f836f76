"""VGG: its pooling, and the order in which its dense layers get the channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax.models.vgg import VGG, average_pool
from tests.golden.fill import noise


@pytest.mark.parametrize(("size", "wanted"), [(7, 7), (1, 7), (9, 7), (10, 3), (5, 1)])
def test_pooling_is_adaptive(size, wanted):
    """Window i goes from floor(i * size / wanted) to ceil((i + 1) * size / wanted)."""
    x = noise("x", (2, size, size, 3))
    found = average_pool(jnp.asarray(x), wanted)
    assert found.shape == (2, wanted, wanted, 3)
    for row in range(wanted):
        for column in range(wanted):
            (top, end), (left, right) = (
                (
                    int(np.floor(i * size / wanted)),
                    int(np.ceil((i + 1) * size / wanted)),
                )
                for i in (row, column)
            )
            expected = x[:, top:end, left:right].mean((1, 2))
            np.testing.assert_allclose(found[:, row, column], expected, atol=1e-6)


def test_dense_layers_get_channels_before_pixels():
    """As PyTorch's flatten gives them; bias and batch norm of a convolution act."""
    module = VGG(2, (1, 1, 1, 1, 1), hidden=(), pool=2)
    x = noise("images", (2, 64, 64, 1))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: abs(noise(jax.tree_util.keystr(path), leaf.shape)) / 10,
        shapes,
    )
    places = (5 * 4 + 1 * 2 + 0, 400 * 4 + 0 * 2 + 1)  # channel, row and column
    kernel = np.zeros((2048, 2), np.float32)
    kernel[places, (0, 1)] = 1
    variables["params"]["output"] = {"kernel": kernel, "bias": np.zeros(2, np.float32)}
    logits, seen = module.apply(
        variables, x, capture_intermediates=True, mutable=["intermediates"]
    )
    (last,) = seen["intermediates"]["stage5_unit1"]["__call__"]
    pooled = np.asarray(last).reshape(2, 2, 2, 2, 2, 512).max((2, 4))
    expected = np.stack([pooled[:, 1, 0, 5], pooled[:, 0, 1, 400]], -1)
    assert expected.std() > 0
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
