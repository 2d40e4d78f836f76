"""The CIFAR networks and the generator against recorded outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import losses, teacher
from adadfq_jax.game import players
from adadfq_jax.models.generator import CifarGenerator
from adadfq_jax.network import statistics
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
    graph = helpers.graph("resnet20", NETWORKS[network])
    run = jax.jit(functools.partial(players.p_forward, graph))
    return run(helpers.filled_variables(network), images(network))


@pytest.mark.parametrize("network", NETWORKS)
def test_recorded_logits(network):
    logits, _ = played_p(network)
    helpers.assert_close(logits, GOLDEN[network]["logits"], 1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_recorded_batch_norm_inputs(network):
    _, bn_inputs = played_p(network)
    recorded = [key for key in GOLDEN[network] if key.startswith("bn_")]
    assert len(recorded) == 14
    found = {
        teacher.torch_name(("batch_stats", *norm.split("."), kind)): leaf
        for norm, moments in bn_inputs.items()
        for kind, leaf in moments.items()
    }
    for key in recorded:
        kind, layer = key.removeprefix("bn_").split(".", 1)
        helpers.assert_close(
            found[f"{layer}.running_{kind}"], GOLDEN[network][key], 1e-5
        )


@pytest.mark.parametrize("network", NETWORKS)
def test_recorded_bn_stats_loss(network):
    _, bn_inputs = played_p(network)
    graph = helpers.graph("resnet20", NETWORKS[network])
    running = statistics(graph, helpers.filled_variables(network))
    found = losses.bn_stats_loss(bn_inputs, running)
    helpers.assert_close(found, GOLDEN[network]["bns_loss"], 1e-5)


@pytest.mark.parametrize(("network", "bits", "tolerance"), QUANTIZED)
def test_recorded_quantized_network(network, bits, tolerance):
    golden, variables = GOLDEN[network], helpers.filled_variables(network)
    graph = helpers.graph("resnet20", NETWORKS[network])
    # Op by op, as it was recorded: under jit one rounding in a million differs.
    logits, found = helpers.observe(graph, variables, images(network), bits)
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
