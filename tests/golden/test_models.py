"""The CIFAR networks and the generator against recorded outputs."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import losses, models, quant, teacher
from adadfq_jax.models import layers
from adadfq_jax.models.generator import CifarGenerator
from tests import helpers
from tests.golden.fill import labels, noise

NETWORKS = {"resnet20_cifar10": 10, "resnet20_cifar100": 100}


GOLDEN = {name: helpers.load_npz(name) for name in NETWORKS}


# With rounding, 8 bits are the least reproducible: flips spread (golden/README.md).
QUANTIZED = [
    (network, bits, 5e-3 if bits == 8 else 1e-5)
    for network in NETWORKS
    for bits in (3, 4, 8)
    if f"q{bits}_logits" in GOLDEN[network]
]


# A convolution's bias before a training-mode batch norm: its true gradient is 0.
WITHOUT_GRADIENT = ("conv_blocks1.0.bias", "conv_blocks2.0.bias")


def images(network):
    return noise(f"x{network}", (8, 3, 32, 32)).transpose(0, 2, 3, 1)


@functools.cache
def played_p(network):
    """P's logits and the statistics of its batch norms' inputs."""
    model = models.get_model("resnet20", num_classes=NETWORKS[network])
    variables = helpers.filled_variables(network)
    run = jax.jit(functools.partial(model.apply, mutable=["bn_inputs"]))
    logits, stored = run(variables, images(network))
    return logits, stored["bn_inputs"]


@pytest.mark.parametrize("network", NETWORKS)
def test_recorded_logits(network):
    logits, _ = played_p(network)
    helpers.assert_close(logits, GOLDEN[network]["logits"], 1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_recorded_batch_norm_inputs(network):
    _, bn_inputs = played_p(network)
    flat = flax.traverse_util.flatten_dict({"batch_stats": bn_inputs})
    found = {teacher.torch_name(path): leaf for path, leaf in flat.items()}
    recorded = [key for key in GOLDEN[network] if key.startswith("bn_")]
    assert len(recorded) == 14
    for key in recorded:
        kind, layer = key.removeprefix("bn_").split(".", 1)
        helpers.assert_close(
            found[f"{layer}.running_{kind}"], GOLDEN[network][key], 1e-5
        )


@pytest.mark.parametrize("network", NETWORKS)
def test_recorded_bn_stats_loss(network):
    _, bn_inputs = played_p(network)
    running = helpers.filled_variables(network)["batch_stats"]
    assert jax.tree.structure(bn_inputs) == jax.tree.structure(running)
    found = losses.bn_stats_loss(bn_inputs, running)
    helpers.assert_close(found, GOLDEN[network]["bns_loss"], 1e-5)


def execution_order(name):
    """Sorts quantizers as they run: the stem, then unit by unit from the inside."""
    module, *rest = name
    return module != "init_quant", module, rest != ["conv1_quant"]


@pytest.mark.parametrize(("network", "bits", "tolerance"), QUANTIZED)
def test_recorded_quantized_network(network, bits, tolerance):
    golden, variables = GOLDEN[network], helpers.filled_variables(network)
    model = models.get_model(
        "resnet20",
        num_classes=NETWORKS[network],
        act_quant=functools.partial(layers.ActQuant, bits=bits),
    )
    ranges = helpers.fresh_ranges(model, images(network))
    # Op by op, as it was recorded: under jit one rounding in a million differs.
    logits, moved = model.apply(
        {
            "params": quant.quantize_kernels(variables["params"], bits),
            "batch_stats": variables["batch_stats"],
            "ranges": ranges,
        },
        images(network),
        mutable=["ranges"],
    )
    flat = flax.traverse_util.flatten_dict(moved["ranges"])
    order = sorted(flat, key=lambda path: execution_order(path[:-1]))
    found = [quant.read_range(flat[path], "corrected") for path in order]
    assert len(found) == len(golden["act_names"]) == 19
    helpers.assert_close(logits, golden[f"q{bits}_logits"], tolerance)
    helpers.assert_close(found, golden[f"q{bits}_ranges"], tolerance)


@functools.cache
def played_generator():
    """Images of the filled generator, and its gradients by the original's names."""
    model, variables = CifarGenerator(10, (32, 32, 3)), helpers.filled_generator()
    z, y = noise("gz", (16, 100)), labels("gy", 16, 10)
    up = noise("gup", (16, 3, 32, 32)).transpose(0, 2, 3, 1)

    def value(params):
        trees = {**variables, "params": params}
        made, _ = model.apply(trees, z, y, mutable=["batch_stats"])
        return jnp.sum(made * up), made

    (_, made), grads = jax.value_and_grad(value, has_aux=True)(variables["params"])
    return made, helpers.generator_to_torch(grads)


def test_recorded_generator_images():
    made, _ = played_generator()
    expected = helpers.load_npz("generator_cifar")["images"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4)


def test_recorded_generator_gradients():
    _, grads = played_generator()
    golden = helpers.load_npz("generator_cifar")
    recorded = [key for key in golden if key.startswith("grad.")]
    assert len(recorded) == 12
    for key in recorded:
        found = grads[key.removeprefix("grad.")]
        if key.endswith(WITHOUT_GRADIENT):
            assert np.abs(found).max() < 1e-3
        else:
            helpers.assert_close(found, golden[key], 2e-5)
