"""VGG: its pooling, and the order in which its dense layers get the channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import load_quantized
from adadfq_jax.deploy import verify
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_onnx
from adadfq_jax.models.vgg import VGG, average_pool
from adadfq_jax.network import as_function
from tests import quantized
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


def test_q_of_it_is_an_onnx_file(tmp_path):
    """The biases before batch norms, the pooling and the hidden layer included."""
    module, shape = VGG(4, (1, 1, 1, 1, 1), hidden=(8,), pool=3), (32, 32, 1)
    info = NetworkInfo("vgg", 4, shape, (0.5,), (0.25,), 4, 4)
    images = noise("images", (4, *shape))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            noise(jax.tree_util.keystr(path), leaf.shape) / np.sqrt(leaf[..., 0].size)
            if path[-1].key == "kernel"
            else 1 + abs(noise(jax.tree_util.keystr(path), leaf.shape)) / 10
        ),
        jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(module.init, jax.random.key(0), images),
        ),
    )
    function = as_function(module, variables)
    file = quantized.save(tmp_path / "q.safetensors", info, None, images, function)
    network = load_quantized(file, module, variables)
    assert len(network.kernels) == 7 and len(network.graph.batch_norms) == 5
    ours = np.asarray(network(images))
    run = verify.onnx_runner(
        to_onnx(network, OnnxOptions()).SerializeToString(), lambda x: x
    )
    errors = np.abs(run(images) - ours).max(-1)
    assert np.median(errors) < 1e-3 * ours.std() and ours.std(0).min() > 0
