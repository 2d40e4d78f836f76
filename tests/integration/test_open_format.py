"""What others build on: the plain numpy loader, integer arithmetic, load_quantized."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adadfq_jax
from adadfq_jax import config
from adadfq_jax.deploy.codes import quantize_range
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.game import players
from adadfq_jax.models.convolution import convolve
from adadfq_jax.network import Hooks, run
from tests import helpers, plain_loader, quantized, runs
from tests.quantized import filled


def test_the_package_imports_without_jax():
    code = "import sys, adadfq_jax; sys.exit('jax' in sys.modules)"
    assert runs.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module", params=[(4, 4), (3, 3), (8, 8), (5, 2), (3, 2, 8)])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("q") / "quantized.safetensors"
    return quantized.save_fashion_mnist(path, *request.param)


def test_a_plain_loader_computes_the_same(file):
    header, tensors = plain_loader.read(file)
    network = adadfq_jax.load_quantized(file)
    for name, kernel in network.kernels.items():
        np.testing.assert_array_equal(tensors[name], kernel.dequantize())
    for name, ends in network.ranges.items():
        np.testing.assert_array_equal(tensors[f"{name}.range"], np.float32(ends))
    images = quantized.fashion_mnist_images(20)
    ours = np.asarray(network(images))
    theirs = plain_loader.resnet20(header, tensors, images)
    # Sums in another order: an activation on the edge of two codes takes the other.
    assert np.mean(np.abs(ours - theirs)) < 0.02 * ours.std()
    assert np.mean(ours.argmax(-1) == theirs.argmax(-1)) >= 0.95


def test_load_quantized_says_what_the_network_is(file):
    network = adadfq_jax.load_quantized(str(file))
    info = network.info
    assert (network.weight_bits, network.act_bits) == (info.weight_bits, info.act_bits)
    assert (network.num_classes, network.image_shape) == (10, (28, 28, 1))
    assert (network.mean, network.std) == (quantized.MEAN, quantized.STD)
    assert len(network.ranges) == 19 and len(network.kernels) == 22
    assert all(lo <= hi for lo, hi in network.ranges.values())


def record_layers(network, images):
    """In turn: (kernel's entry, input, output, the parameters) of every product.

    And the quantized activations by name, and the logits.
    """
    layers, quantized_by = [], {}
    graph, q, options = network.graph, network.variables, network.options
    names = iter(graph.kernels)

    def activation(entry, x):
        y = players.quantize_activation(entry, x, q.ranges[entry.name], options)
        quantized_by[entry.name] = y
        return y

    def convolution(params, x, kernel):
        y = convolve(params, x, kernel)
        layers.append((next(names), x, y, params))
        return y

    hooks = Hooks(q.kernels, activation, None, convolution)
    logits, _ = run(graph, q.variables, images, hooks)
    return layers, quantized_by, logits


def to_codes(x, name, network):
    """(int32 codes, zero point, scale) of an activation, and whether all are codes."""
    bits = network.options.bits_of_activation(name)
    with jax.ensure_compile_time_eval():
        scale, zero_point, offset, _ = quantize_range(*network.ranges[name], bits)
    assert offset == 0
    codes = jnp.round(x / scale).astype(jnp.int32) + zero_point
    return codes, zero_point, scale, (codes.min() >= 0) & (codes.max() < 2**bits)


def conv_sums(u, a, v, b, params):
    """sum (u - a)(v - b) of int32 codes; a and b are the zero points."""
    numbers = {**params, "precision": None, "preferred_element_type": jnp.int32}
    return jax.lax.conv_general_dilated_p.bind(u - a, v - b, **numbers)


def classifier(network, kernel, quantized_by, logits):
    """The last layer on the integer sum of the pooled codes, beside Q's logits.

    Those of the same program: in another one, an activation in a million is rounded to
    the next code.
    """
    name = network.graph.kernels[-1].activation
    u, a, scale, are_codes = to_codes(quantized_by[name], name, network)
    v, b, kernel_scale = kernel
    count = u.shape[1] * u.shape[2]
    total = u.sum((1, 2)) - a * count
    sums = total @ v - b * total.sum(-1, keepdims=True)
    assert sums.dtype == jnp.int32
    # The number of the pooled goes to the scale.
    found = sums.astype(jnp.float32) * (scale / count) * kernel_scale
    return are_codes, found + network.variables.variables["output.bias"], logits


def integer_products(network, images, *, pooled=False):
    """Checks the convolutions whose input is quantized; the names of the others.

    pooled: whether to check a last layer behind a pooling as well.
    """
    on_floats = []

    @jax.jit
    def compute(images, kernels):
        pairs = []
        layers, quantized_by, logits = record_layers(network, images)
        for entry, x, expected, params in layers:
            found = [name for name, y in quantized_by.items() if y is x]
            assert found == [entry.activation] * (
                not entry.reason and entry.name != "output.kernel"
            )
            if not found:
                on_floats.append(entry.name.removesuffix(".conv.kernel"))
                continue
            u, a, scale, are_codes = to_codes(x, found[0], network)
            v, b, kernel_scale = kernels[entry.name]
            sums = conv_sums(u, a, v, b, params)
            assert sums.dtype == jnp.int32
            found = sums.astype(jnp.float32) * scale * kernel_scale
            pairs.append((are_codes, found, expected))
        if pooled:
            last = kernels[network.graph.kernels[-1].name]
            pairs.append(classifier(network, last, quantized_by, logits))
        return pairs

    kernels = {
        name: (np.int32(kernel.codes), np.int32(kernel.zero_point), kernel.scale)
        for name, kernel in network.kernels.items()
    }
    for are_codes, found, expected in compute(images, kernels):
        assert are_codes
        helpers.assert_close(found, expected, 1e-5)
    return on_floats


@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
def test_zero_points_can_be_taken_off_afterwards(file, groups):
    """A runtime may multiply the unsigned codes and take the zero points off later.

    sum (u - a)(v - b) = sum u v - b sum u - a sum v + a b n, with v and b of the file.
    """
    kernel = adadfq_jax.load_quantized(file).kernels["stage1_unit1.conv1.conv.kernel"]
    v = jnp.asarray(kernel.codes[:, :, : 16 // groups], jnp.int32)
    b = jnp.asarray(kernel.zero_point, jnp.int32)
    assert kernel.codes.dtype == np.uint8 and b.shape == (16,)
    u = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 7, 7, 16)), jnp.int32)
    a = 5

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            *(x, kernel, (2, 2), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    ones, all_ones = jnp.ones_like(u), jnp.ones_like(v)
    apart = conv(u, v) - b * conv(u, all_ones) - a * conv(ones, v)
    apart += a * b * conv(ones, all_ones)
    real = jnp.asarray(kernel.dequantize()[:, :, : 16 // groups]) / kernel.scale
    np.testing.assert_allclose(apart, conv(jnp.float32(u - a), real), atol=0.02)


def test_integers_with_int32_sums_give_the_same(file):
    network = adadfq_jax.load_quantized(file)
    images = quantized.fashion_mnist_images(4)
    assert integer_products(network, images, pooled=True) == ["init_block"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model", ["mobilenetv2_small", "mobilenetv2_w1"])
def test_integers_of_depthwise_kernels_and_a_convolution_at_the_end(
    tmp_path, model, bits
):
    """With filled weights; every layer whose input is quantized.

    In MobileNetV2 others are not: the outputs of the linear bottlenecks, which no
    activation function follows, are no codes, and enter the next unit's expansion or
    the last convolution before the pooling as they are.
    """
    shape = (28, 28, 1) if model == "mobilenetv2_small" else (32, 32, 3)
    ends = (0.5,) * shape[-1]
    info = NetworkInfo(model, 10, shape, ends, ends, bits, bits)
    images = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    file = quantized.save(tmp_path / "q.safetensors", info, filled(info), images)
    network = adadfq_jax.load_quantized(file)
    kernels = [name.removesuffix(".conv.kernel") for name in network.kernels]
    expansions = [
        name
        for name in kernels
        if name.endswith(".conv1") and not name.startswith("stage1_")
    ]
    assert sum(name.endswith(".conv2") for name in kernels) >= 8  # depthwise
    on_floats = set(integer_products(network, images)) - {"output.kernel"}
    assert on_floats == {"init_block", *expansions, "final_block"}


def test_four_bit_kernels_are_under_a_sixth_of_float32(tmp_path):
    file = quantized.save_fashion_mnist(tmp_path / "q.safetensors", 4, 4)
    float32 = config.ASSETS / "fashion_mnist_resnet20.safetensors"
    assert file.stat().st_size < float32.stat().st_size / 6
