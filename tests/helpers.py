"""Recorded numbers and filled networks; tests/golden/README.md says what they are."""

import functools
import json
import struct
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import game, models, quant, teacher
from adadfq_jax.deploy.network import NetworkInfo, graph_of
from adadfq_jax.game import players
from adadfq_jax.models.generator import CifarGenerator
from adadfq_jax.network import named
from tests.golden.fill import fill

GOLDEN = Path(__file__).parent / "golden"

# Names of the original generator and ours.
GENERATOR_MODULES = {
    "label_emb": "embedding",
    "l1.0": "dense",
    "conv_blocks0.0": "dense_bn",
    "conv_blocks1.0": "conv1",
    "conv_blocks1.1": "conv1_bn",
    "conv_blocks2.0": "conv2",
    "conv_blocks2.1": "conv2_bn",
    "conv_blocks2.3": "conv3",
    "conv_blocks2.5": "image_bn",
}


def variable_shapes(model, classes, image_shape):
    """The tree of shapes that a network of the package has for variables."""
    module = models.get_model(model, num_classes=classes)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)


def load_npz(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def load_shapes(name):
    """State-dict keys and shapes of a recorded network."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def write_typed(path, dtype, metadata=None):
    """A safetensors file of one `weight` of 16 zeros, of any type that the format has.

    metadata: strings by name.
    """
    size = {"F4": 8, "F8_E4M3": 16, "C64": 128}[dtype]
    header = {"weight": {"dtype": dtype, "shape": [16], "data_offsets": [0, size]}}
    if metadata:
        header["__metadata__"] = metadata
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(size))
    return path


def deviation(found, expected):
    """Largest absolute difference, relative to the largest expected element."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    largest = np.abs(expected).max()
    return np.abs(found - expected).max() / (largest if largest > 0 else 1)


def assert_close(found, expected, tolerance):
    """Within `tolerance` of the largest expected element; NaN fails."""
    measured = deviation(found, expected)
    assert measured <= tolerance, f"{measured:.3g} > {tolerance:.3g}"


def filled_state_dict(record, prefix):
    """A recorded network's state dict, filled as `<prefix>.<key>`."""
    return {
        key: fill(f"{prefix}.{key}", tuple(shape))
        for key, shape in load_shapes(record).items()
    }


@functools.cache
def filled_tree(network, prefix=None):
    """Variables of a CIFAR ResNet-20, filled as `<prefix>.<key>`."""
    state_dict = filled_state_dict(network, prefix or network)
    return teacher.from_state_dict(state_dict, "resnet20")


def filled_variables(network, prefix=None):
    """Those by name."""
    return named(filled_tree(network, prefix))


@functools.cache
def graph(model, classes=10, image_shape=(32, 32, 3), **info):
    """A network of the package, traced."""
    zeros = (0.0,) * image_shape[2], (1.0,) * image_shape[2]
    return graph_of(NetworkInfo(model, classes, image_shape, *zeros, 4, 4, **info))


def observe(network, variables, images, bits, **options):
    """Q's logits of a first batch, which its ranges see, and those ranges in order."""
    q_options = game.QOptions(bits, bits, **options)
    own = {name: variables[name] for name in network.needed}
    teacher_ = game.with_clip_ratios(network, own, q_options)
    q = players.quantize(network, q_options, teacher_, {}, players.init_ranges(network))
    logits, ranges = players.q_observe(network, q_options, q, images)
    found = [quant.read_range(ranges[a.name], "corrected") for a in network.activations]
    return logits, jnp.asarray(found)


def to_state_dict(params):
    """Parameters by name -> arrays by the original's names and layout."""
    tree = flax.traverse_util.unflatten_dict(jax.device_get(params), sep=".")
    return teacher.to_state_dict({"params": tree})


def generator_path(key):
    """Original key -> path in the generator's Flax variables."""
    module, leaf = key.rsplit(".", 1)
    name = GENERATOR_MODULES[module]
    if name == "embedding":
        return ("params", "embedding")
    if leaf.startswith("running_"):
        return ("batch_stats", name, leaf.removeprefix("running_"))
    weight = "scale" if name.endswith("bn") else "kernel"
    return ("params", name, weight if leaf == "weight" else leaf)


def _flip(key, array):
    """Between the layouts of PyTorch and Flax; its own inverse for dense kernels."""
    return array.T if key == "l1.0.weight" else array


@functools.cache
def filled_generator(prefix="gc", classes=10):
    """Variables of the CIFAR generator at 32 x 32 x 3, filled as `<prefix>.<key>`."""
    model = CifarGenerator(classes, (32, 32, 3))
    init = functools.partial(model.init, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((2, 100)), jnp.zeros(2, jnp.int32))
    leaves = {}
    for key, shape in load_shapes("generator_cifar").items():
        if key.endswith("num_batches_tracked"):
            continue
        shape = (classes, 100) if key == "label_emb.weight" else tuple(shape)
        array = _flip(key, fill(f"{prefix}.{key}", shape))
        leaves[generator_path(key)] = (
            array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        )
    variables = flax.traverse_util.unflatten_dict(leaves)
    expected = jax.tree.map(jnp.shape, shapes)
    assert jax.tree.map(jnp.shape, variables) == expected
    return variables


def generator_to_torch(params):
    """The generator's Flax parameters (or gradients) by the original's names."""
    found = {}
    for key in load_shapes("generator_cifar"):
        if key.endswith("num_batches_tracked") or "running_" in key:
            continue
        array = functools.reduce(lambda t, k: t[k], generator_path(key)[1:], params)
        array = _flip(key, np.asarray(array))
        found[key] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    return found


def pixels_as_logits(variables, images):
    """A network whose class is the brightest of the first four pixels."""
    return images.reshape(images.shape[0], -1)[:, :4] * variables
