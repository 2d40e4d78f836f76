"""Networks and the generator with filled weights against recorded outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import models
from adadfq_jax.game import layer_bits
from adadfq_jax.models.generator import CifarGenerator, draw_inputs
from tests import helpers
from tests.golden.fill import noise


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


PINNED = {
    # name: (classes, channels) -> parameters; kernels, running statistics
    "resnet20": ({(10, 3): 272_474, (100, 3): 278_324, (10, 1): 272_186}, 22, 1568),
    "resnet32": ({(10, 3): 466_906, (100, 3): 472_756}, 34, 2464),
    "resnet44": ({(10, 3): 661_338, (100, 3): 667_188}, 46, 3360),
    "resnet56": ({(10, 3): 855_770, (100, 3): 861_620}, 58, 4256),
    "resnet110": ({(10, 3): 1_730_714, (100, 3): 1_736_564}, 112, 8288),
    "resnet20a": ({(10, 3): 269_722, (100, 3): 275_572}, 20, 1376),
    "resnet32a": ({(10, 3): 464_154, (100, 3): 470_004}, 32, 2272),
    "resnet44a": ({(10, 3): 658_586, (100, 3): 664_436}, 44, 3168),
    "resnet56a": ({(10, 3): 853_018, (100, 3): 858_868}, 56, 4064),
    "resnet110a": ({(10, 3): 1_727_962, (100, 3): 1_733_812}, 110, 8096),
    "resnet18": ({(1000, 3): 11_689_512}, 21, 9600),
    "resnet34": ({(1000, 3): 21_797_672}, 37, 17_024),
    "resnet50": ({(1000, 3): 25_557_032}, 54, 53_120),
    "resnet50b": ({(1000, 3): 25_557_032}, 54, 53_120),
    "mobilenetv2_w1": ({(1000, 3): 3_504_960}, 54, 34_176),
    "mobilenet_v2": ({(1000, 3): 3_504_872}, 53, 34_112),
    "mobilenetv2_small": ({(10, 1): 88_650}, 26, 4832),
    "resnet18_cifar": ({(10, 3): 11_173_962, (1000, 3): 11_681_832}, 21, 9600),
    "resnet34_cifar": ({(10, 3): 21_282_122}, 37, 17_024),
    "resnet50_cifar": ({(10, 3): 23_520_842}, 54, 53_120),
    "vgg11_bn": ({(1000, 3): 132_868_840}, 11, 5504),
    "vgg13_bn": ({(1000, 3): 133_053_736}, 13, 5888),
    "vgg16_bn": ({(1000, 3): 138_365_992}, 16, 8448),
    "vgg19_bn": ({(1000, 3): 143_678_248}, 19, 11_008),
    "vgg11_bn_cifar": ({(10, 3): 9_231_114}, 9, 5504),
    "vgg13_bn_cifar": ({(10, 3): 9_416_010}, 11, 5888),
    "vgg16_bn_cifar": ({(10, 3): 14_728_266}, 14, 8448),
    "vgg19_bn_cifar": ({(10, 3): 20_040_522}, 17, 11_008),
    "efficientnet_lite0": ({(1000, 3): 4_652_008}, 50, 42_016),
    "efficientnet_lite1": ({(1000, 3): 5_416_680}, 65, 53_664),
    "efficientnet_lite2": ({(1000, 3): 6_092_072}, 65, 58_096),
    "tf_efficientnet_lite0": ({(1000, 3): 4_652_008}, 50, 42_016),
    "tf_efficientnet_lite1": ({(1000, 3): 5_416_680}, 65, 53_664),
    "tf_efficientnet_lite2": ({(1000, 3): 6_092_072}, 65, 58_096),
    "tiny": ({(10, 3): 1_586, (10, 1): 1_442}, 3, 48),
}


@pytest.mark.parametrize("name", models.names())
def test_pinned_sizes(name):
    sizes, kernels, statistics = PINNED[name]  # every network has its entry
    for (classes, channels), expected in sizes.items():
        shapes = helpers.variable_shapes(name, classes, (32, 32, channels))
        assert size(shapes["params"]) == expected
        assert size(shapes["batch_stats"]) == statistics
        leaves = jax.tree_util.tree_leaves_with_path(shapes["params"])
        assert sum(path[-1].key == "kernel" for path, _ in leaves) == kernels


@pytest.mark.parametrize(
    ("name", "multiplications"),
    [("resnet18_cifar", 555_422_720), ("vgg16_bn_cifar", 313_201_664)],
)
def test_networks_for_small_images_multiply_as_often_as_others_do(
    name, multiplications
):
    """Their strides and pools; by hand, for images of 32 x 32."""
    graph = helpers.graph(name, 10, (32, 32, 3))
    assert sum(kernel.multiplications for kernel in graph.kernels) == multiplications
    assert len(graph.batch_norms) == len(graph.kernels) - 1


@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [
        ("resnet18_cifar", 3, 32),
        ("vgg16_bn_cifar", 1, 28),
        ("resnet18", 1, 224),
        ("vgg16_bn", 3, 224),
        ("tf_efficientnet_lite2", 3, 260),
    ],
)
def test_usual_image_shapes(name, channels, side):
    assert models.usual_image_shape(name, channels) == (side, side, channels)


def test_unknown_network():
    with pytest.raises(ValueError, match=r"'resnet21'.*resnet20"):
        models.get_model("resnet21", num_classes=10)


def made_up(init, *inputs):
    """Variables of the right shapes; drawing them by `init` takes long to compile."""
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: np.abs(noise("v", leaf.shape)) / 10, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _apply(generator, variables, z, y):
    return generator.apply(variables, z, y, mutable=["batch_stats"])[0]


def make_images(generator, variables, z, y):
    """What a generator makes in training, as it is given the statistics of a batch."""
    return np.asarray(_apply(generator, variables, z, y))


def test_small_grey_images():
    model = models.get_model("resnet20", num_classes=10)
    x = noise("grey", (2, 28, 28, 1))
    logits = jax.jit(model.apply)(made_up(model.init, x), x)
    assert logits.shape == (2, 10) and np.isfinite(logits).all()
    generator, z, y = (
        CifarGenerator(10, (28, 28, 1)),
        noise("z", (4, 100)),
        np.arange(4),
    )
    variables = made_up(generator.init, z, y)
    made = make_images(generator, variables, z, y)
    assert made.shape == (4, 28, 28, 1)
    # In normalised space: mean 0 and variance 1 over the batch.
    np.testing.assert_allclose([made.mean(), made.var()], [0, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((32, 32, 3), 128, 1_052_139),
        ((28, 28, 1), 128, 857_065),
        # Embedding 1,000, dense 413,696 and its BN 128, conv1 37,056 and conv2 18,528
        # with theirs, conv3 867.
        ((32, 32, 3), 64, 471_275),
    ],
)
def test_size_of_the_generator(shape, channels, expected):
    generator = CifarGenerator(10, shape, channels=channels)
    init = functools.partial(generator.init, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((2, 100)), jnp.zeros(2, jnp.int32))
    assert size(shapes["params"]) == expected


def test_drawn_inputs():
    latents, y = draw_inputs(jax.random.key(0), 4096, 10)
    assert latents.shape == (4096, 100) and y.dtype == jnp.int32
    assert abs(float(latents.mean())) < 0.01 and abs(float(latents.std()) - 1) < 0.01
    assert np.bincount(y, minlength=10).min() > 300 and y.max() == 9


@pytest.mark.parametrize("shape", [(30, 28, 3), (27, 33, 1), (3, 2, 1)])
def test_images_of_any_size_are_made_larger_and_cropped(shape):
    generator = CifarGenerator(10, shape)
    z, y = noise("z", (4, 100)), np.arange(4)
    variables = made_up(generator.init, z, y)
    made = make_images(generator, variables, z, y)
    assert made.shape == (4, *shape)
    height, width = (-(-n // 4) for n in shape[:2])
    assert variables["params"]["dense"]["bias"].size == 128 * height * width
    np.testing.assert_allclose(made.mean((0, 1, 2)), 0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "activation"),
    [
        ("resnet20", 32, "output.kernel:input"),
        ("resnet50", 64, "output.kernel:input"),
        ("mobilenetv2_w1", 64, "output.kernel:input"),
    ],
)
def test_the_first_and_the_last_layer(name, size, activation):
    graph = helpers.graph(name, 7, (size, size, 3))
    expected = ("init_block.conv.kernel", "output.kernel", activation)
    assert layer_bits.resolve(graph, 4, 4, 8).bits == dict.fromkeys(expected, 8)
    assert layer_bits.resolve(graph, 4, 4).bits == {}
