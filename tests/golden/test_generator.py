"""The generator with conditional batch norms against recorded images."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax.models import layers
from adadfq_jax.models.generator import CifarGenerator, ImagenetGenerator, get_generator
from tests import helpers
from tests.golden.fill import fill, labels, noise

MODULES = {
    "l1.0": "dense",
    "conv_blocks0_0": "dense_bn",
    "conv_blocks1_0": "conv1",
    "conv_blocks1_1": "conv1_bn",
    "conv_blocks2_0": "conv2",
    "conv_blocks2_1": "conv2_bn",
    "conv_blocks2_3": "conv3",
    "conv_blocks2_5": "image_bn",
}
LEAVES = {"weights.weight": "scale", "biases.weight": "bias"}


def flax_path(key):
    """Original key -> path in the generator's variables."""
    start = next(start for start in MODULES if key.startswith(f"{start}."))
    module, leaf = MODULES[start], key.removeprefix(f"{start}.")
    if leaf.startswith("running_"):
        # A conditional batch norm wraps one without scale and bias.
        inner = () if module == "image_bn" else ("bn",)
        return ("batch_stats", module, *inner, leaf.removeprefix("running_"))
    return ("params", module, LEAVES.get(leaf, leaf.replace("weight", "kernel")))


def filled():
    leaves = {}
    for key, shape in helpers.load_shapes("generator_imagenet").items():
        if key.endswith("num_batches_tracked"):
            continue
        array = fill(f"gi.{key}", tuple(shape))
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        leaves[flax_path(key)] = array.T if key == "l1.0.weight" else array
    return flax.traverse_util.unflatten_dict(leaves)


def test_recorded_images():
    variables, model = filled(), ImagenetGenerator(1000, (64, 64, 3))
    z, y = noise("giz", (8, 100)), labels("giy", 8, 1000)
    shapes = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), z, y)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    made, _ = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))(
        variables, z, y
    )
    expected = helpers.load_npz("generator_imagenet64")["images"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "channels", "expected"),
    [
        ("conditional_bn", (224, 224, 3), 128, 41_405_315),
        ("conditional_bn", (28, 36, 1), 128, 1_676_417),
        # Dense 407,232, conv1 36,928, conv2 18,464 and conv3 289; 320,000 in the BNs.
        ("conditional_bn", (28, 36, 1), 64, 782_913),
        ("embedding", (224, 224, 3), 128, 40_865_955),
    ],
)
def test_sizes(name, shape, channels, expected):
    model = get_generator(name, num_classes=1000, image_shape=shape, channels=channels)
    made, variables = jax.eval_shape(
        lambda *inputs: model.init_with_output(jax.random.key(0), *inputs),
        jnp.zeros((2, 100)),
        jnp.zeros(2, jnp.int32),
    )
    assert made.shape == (2, *shape)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == expected


def test_names():
    made = {
        name: type(get_generator(name, num_classes=2, image_shape=(4, 4, 1)))
        for name in ("embedding", "conditional_bn")
    }
    assert made == {"embedding": CifarGenerator, "conditional_bn": ImagenetGenerator}


def test_conditional_batch_norm_starts_as_a_plain_one():
    x, y = noise("x", (4, 3, 3, 5)), np.arange(4)
    layer = layers.ConditionalBatchNorm(7)
    variables = layer.init(jax.random.key(0), x, y)
    found, _ = layer.apply(variables, x, y, mutable=["batch_stats"])
    plain = layers.BatchNorm(use_scale=False)
    expected, _ = plain.apply(
        {"batch_stats": variables["batch_stats"]["bn"]}, x, mutable=["batch_stats"]
    )
    np.testing.assert_array_equal(found, expected)


def test_conditional_batch_norm_takes_the_labels_scale_and_bias():
    x, y = noise("x", (4, 3, 3, 5)), np.array([6, 0, 0, 3])
    layer = layers.ConditionalBatchNorm(7)
    variables = layer.init(jax.random.key(0), x, y)
    scale, bias = noise("s", (7, 5)), noise("b", (7, 5))
    conditioned = {**variables, "params": {"scale": scale, "bias": bias}}
    plain = layer.apply(variables, x, y)
    expected = plain * scale[y][:, None, None] + bias[y][:, None, None]
    helpers.assert_close(layer.apply(conditioned, x, y), expected, 1e-6)
