"""Translation of any traced network to ONNX, run by ONNX Runtime beside the network."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import lax
from onnx import TensorProto, helper

from adadfq_jax import quant
from adadfq_jax.deploy.codes import Kernel, quantize_range
from adadfq_jax.deploy.onnx_graph import Graph, Tensor
from adadfq_jax.deploy.onnx_rules import normalised, translate
from adadfq_jax.errors import InputError
from adadfq_jax.network import Hooks, kernels, run, trace
from adadfq_jax.network.run import named
from tests.network_families import (
    FAMILIES,
    IMAGE,
    NONLINEARITIES,
    NORMS,
    attention,
    bare_function,
    conv,
    images_of,
    layers,
    linen,
    ones,
    random_like,
    resnet,
    with_norm,
)

REFUSED = {"bfloat16": "computes in bfloat16"}  # ONNX Runtime has few such operators
NHWC, NCHW = (0, 1, 2, 3), (0, 3, 1, 2)


@pytest.fixture(autouse=True)
def strict():
    """Nothing: networks of users broadcast, and so do Flax's own layers."""


def translated(network, variables, kernels, ranges, order=NHWC):
    """The ONNX model; images lie in it as the order says."""
    graph = Graph()
    height, width, channels = network.image_shape
    shape = network.image_shape
    if network.layout == "NCHW":
        shape = (channels, height, width)
    images = Tensor("images", (network.traced_batch, *shape), order)
    logits = translate(
        graph, network, images, variables=variables, kernels=kernels, ranges=ranges
    )
    graph.output(logits, "logits")
    sizes = ["batch", *(images.stored[1:])]
    classes = ["batch", network.num_classes]
    return graph.model(
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, classes)],
        {},
    )


def float_kernels(network, variables):
    return {name: np.asarray(w) for name, w in kernels(network, variables).items()}


def in_float(network, variables, order=NHWC):
    values = float_kernels(network, variables)
    return translated(network, named(variables), values, {}, order)


def operators(model):
    return collections.Counter(node.op_type for node in model.graph.node)


def onnx_runs(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": np.asarray(images)})[0]


def logits_of(network, variables, hooks=lambda given: Hooks(), given=None):
    """The network's logits of 1 and of 3 images, by one program; `hooks` may be traced.

    hooks: what the function is given -> hooks of the network.
    """

    @jax.jit
    def compute(variables, given, batches):
        found = hooks(given)
        return [run(network, variables, images, found)[0] for images in batches]

    return compute(variables, given, [images_of(count) for count in (1, 3)])


def assert_float_agrees(network, variables):
    runs = onnx_runs(in_float(network, variables))
    for expected in map(np.asarray, logits_of(network, variables)):
        found = runs(images_of(len(expected), network.layout))
        assert found.shape == expected.shape
        size = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * size)


def ends_of_activations(network, variables, kernels):
    """Their smallest and largest values over three images, by name."""

    @jax.jit
    def compute(variables, kernels):
        seen = {}

        def observe(entry, x):
            seen[entry.name] = x.min(), x.max()
            return x

        run(network, variables, images_of(3), Hooks(kernels, activation=observe))
        return seen

    return jax.device_get(compute(variables, kernels))


def assert_quantized_agrees(network, variables, weight_bits, act_bits, *, flips=0.02):
    """Codes on the edge of two may differ: by a share of the logits' spread."""
    integers = {}
    values = float_kernels(network, variables)
    for entry in network.kernels:
        kernel = values[entry.name]
        found = quant.kernel_integers(kernel, weight_bits, None, entry.out_axes)
        integers[entry.name] = Kernel(*found, weight_bits, entry.out_axes)
    dequantized = {name: np.asarray(k.dequantize()) for name, k in integers.items()}
    seen = ends_of_activations(network, variables, dequantized)

    def hooks(given):
        dequantized, seen = given

        def quantize(entry, x):
            return quant.fake_quant(x, *seen[entry.name], act_bits)

        return Hooks(dequantized, activation=quantize)

    ranges = {
        name: quantize_range(*map(float, ends), act_bits) for name, ends in seen.items()
    }
    model = translated(network, named(variables), integers, ranges)
    runs = onnx_runs(model)
    outputs = logits_of(network, variables, hooks, (dequantized, seen))
    for expected in map(np.asarray, outputs):
        found = runs(images_of(len(expected), network.layout))
        atol = flips * np.std(expected) + 1e-6
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    make, (*_, layout) = FAMILIES[name]
    function, variables = make()
    network = trace(function, variables, image_shape=IMAGE, layout=layout)
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            in_float(network, variables)
        return
    assert_float_agrees(network, variables)
    found = operators(assert_quantized_agrees(network, variables, 4, 8))
    quantizers = len(network.activations) + (name == "shufflenet")  # halves have theirs
    assert found["QuantizeLinear"] == quantizers
    assert found["DequantizeLinear"] == quantizers + len(network.kernels)


# What is in the graph, and what is not.


def test_a_resnet_has_one_transpose_and_its_batch_norms_cost_nothing():
    function, variables = resnet()
    network = trace(function, variables, image_shape=IMAGE)
    expected = {"Conv": 8, "Relu": 7, "MaxPool": 1, "Add": 3, "Gemm": 1}
    expected |= {"GlobalAveragePool": 1, "Reshape": 1, "Identity": 1}
    assert operators(in_float(network, variables)) == {**expected, "Transpose": 1}
    assert operators(in_float(network, variables, NCHW)) == expected


@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_end_in_the_kernel_however_they_are_written(name):
    function, variables = with_norm(NORMS[name])
    network = trace(function, variables, image_shape=IMAGE)
    assert operators(in_float(network, variables)) == {
        **{"Transpose": 1, "Conv": 1, "Relu": 1, "GlobalAveragePool": 1},
        **{"Reshape": 1, "Gemm": 1, "Identity": 1},
    }


def test_a_product_that_is_read_twice_is_there_once():
    network, variables = layers(nn.Conv(4, (3, 3)), nn.PReLU())
    graph = trace(network, variables, image_shape=IMAGE)
    assert operators(in_float(graph, variables))["Conv"] == 1


def test_a_function_of_one_example_brings_one_reshape():
    make, (*_, layout) = FAMILIES["vmapped"]
    function, variables = make()
    network = trace(function, variables, image_shape=IMAGE, layout=layout)
    found = operators(in_float(network, variables))
    assert found["Reshape"] == 1 and "Transpose" not in found  # after the pooling


def test_variables_of_kernels_are_not_needed_and_others_are():
    function, variables = bare_function()
    network = trace(function, variables, image_shape=IMAGE)
    values = float_kernels(network, variables)
    others = {k: v for k, v in named(variables).items() if k not in values}
    assert len(others) == len(named(variables)) - 3
    translated(network, others, values, {})
    with pytest.raises(InputError, match="some that the network needs are missing"):
        translated(network, {}, values, {})


@pytest.mark.parametrize("order", [NHWC, NCHW])
def test_pixels_are_normalised_along_the_channels(order):
    graph = Graph()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    images = Tensor("images", (211, 4, 5, 3), order)
    graph.output(normalised(graph, images, mean, std, channels=3), "logits")
    sizes = ["batch", *images.stored[1:]]
    model = graph.model(
        [helper.make_tensor_value_info("images", TensorProto.UINT8, sizes)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, sizes)],
        {},
    )
    pixels = np.arange(120, dtype=np.uint8).reshape(2, 4, 5, 3)
    expected = (np.float32(pixels) / 255 - np.float32(mean)) / np.float32(std)
    found = onnx_runs(model)(pixels.transpose(order))
    np.testing.assert_allclose(found, expected.transpose(order), rtol=1e-6)


# Operations that the families lack.


def test_nonlinearities():
    def network(v, x):
        x = conv(x, v["k"])
        parts = [function(x).mean((1, 2)) for function in NONLINEARITIES.values()]
        return jnp.concatenate(parts, -1) @ v["w"]

    width = 4 * len(NONLINEARITIES)
    variables = random_like({"k": ones(3, 3, 3, 4), "w": ones(width, 5)})
    assert_float_agrees(trace(network, variables, image_shape=IMAGE), variables)


class VisionTransformer(nn.Module):
    """With a token of its own before those of the patches."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=4)(x).reshape(x.shape[0], 16, 8)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(1.0), (1, 17, 8))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)), approximate=False)
        return nn.Dense(5)((x + nn.Dense(8)(y))[:, 0])


def test_a_vision_transformer():
    function, variables = linen(VisionTransformer())
    network = trace(function, variables, image_shape=IMAGE)
    assert_float_agrees(network, variables)
    assert_quantized_agrees(network, variables, 4, 8)


MOVES = {
    "shuffled": lambda x: x.reshape(-1, 16, 8, 2, 8).swapaxes(2, 3).reshape(x.shape),
    "sliced": lambda x: x[:, 1::2, :-3],
    "reversed": lambda x: x[:, ::-1, :, ::-1],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0))),
    "dilated": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 2), (0, 0, 1), (0, 0, 0))),
    "tiled": lambda x: jnp.tile(x, (1, 2, 1, 1)),
    "stacked": lambda x: jnp.stack([x, 2 * x], -1).reshape(*x.shape[:3], 16),
    "taken": lambda x: jnp.take(x, jnp.asarray([3, 0, 0, 7]), -1),
    "unstacked": lambda x: jnp.concatenate(jnp.unstack(x[..., None], axis=3)[:2], -1),
    "transposed": lambda x: x.transpose(0, 2, 1, 3),
    "repeated": lambda x: jnp.repeat(x, 2, 1),
    "resized": lambda x: jax.image.resize(x, (x.shape[0], 8, 8, 8), "bilinear"),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_of_values_before_and_behind_a_pool(name):
    move = MOVES[name]
    function, variables = layers(
        *(nn.Conv(8, (3, 3)), nn.relu, move, lambda x: nn.max_pool(x, (2, 2), (1, 1))),
        *(nn.Conv(8, (3, 3)), nn.tanh, lambda x: x[:, :3, :3], nn.Conv(4, (3, 3))),
    )
    network = trace(function, variables, image_shape=IMAGE)
    assert_float_agrees(network, variables)
    assert_quantized_agrees(network, variables, 8, 4, flips=0.1)


def test_a_convolution_of_one_axis():
    function, variables = layers(
        *(lambda x: x.reshape(x.shape[0], 256, 3), nn.Conv(8, (3,), strides=4)),
        *(nn.relu, lambda x: nn.max_pool(x, (2,), (2,)), nn.Conv(8, (3,))),
        lambda x: x[:, :, None],
    )
    network = trace(function, variables, image_shape=IMAGE)
    assert_float_agrees(network, variables)
    assert_quantized_agrees(network, variables, 4, 8)


class Bare(nn.Module):
    """Products without a bias, straight before the quantizer."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Conv(8, (3, 3), 2, use_bias=False)(x))
        x = nn.relu(nn.Dense(8, use_bias=False)(x))
        x = nn.relu(nn.Dense(8, use_bias=False)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5, use_bias=False)(x)


@pytest.mark.parametrize("bits", [(8, 4), (8, 2), (4, 4), (2, 4), (2, 8), (3, 3)])
def test_narrow_codes_that_onnx_runtime_would_fuse_and_refuse(bits):
    function, variables = linen(Bare())
    network = trace(function, variables, image_shape=IMAGE)
    assert_quantized_agrees(network, variables, *bits, flips=0.1)


# Refusals.


def rest(x):
    return x.reshape(x.shape[0], -1)[:, :8]


def an_image_apart(x):
    return x * jnp.arange(x.shape[0], dtype=x.dtype).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: lax.sort(x), "'sort'"),
        (lambda x: lax.cumsum(x, 1), "'cumsum'"),
        (lambda x: lax.scan(lambda c, y: (c, y * 2), 0.0, x)[1], "'scan'"),
        (an_image_apart, "differs from image to image"),
        (lambda x: jnp.concatenate([x[:1], x[1:]]), "a part of the batch"),
        (lambda x: x[::-1], "a batch in reverse"),
        (lambda x: x.astype(jnp.float16).astype(x.dtype), "computes in float16"),
    ],
)
def test_refusals_take_one_line(operation, message):
    def network(v, x):
        return rest(operation(jax.nn.relu(conv(x, v["k"])))) @ v["w"]

    variables = random_like({"k": ones(3, 3, 3, 8), "w": ones(8, 5)})
    graph = trace(network, variables, image_shape=IMAGE)
    with pytest.raises(InputError, match=message) as refused:
        in_float(graph, variables)
    assert "\n" not in str(refused.value)


def test_attention_has_no_more_nodes_than_it_needs():
    function, variables = attention()
    found = operators(
        in_float(trace(function, variables, image_shape=IMAGE), variables)
    )
    assert found["MatMul"] == 2 and found["Gemm"] == 5
    assert found["Transpose"] <= 9 and found["Reshape"] <= 13
