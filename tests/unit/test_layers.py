"""Layers: convolutions against written-out sums, and what mutable collections do."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax.models import layers
from tests import helpers
from tests.golden.fill import noise


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 1, 1, 5), (3, 7, 2, 1)])
def test_upsample_conv_is_nearest_upsampling_and_a_convolution(shape):
    x, kernel = noise("x", shape), noise("k", (3, 3, shape[-1], 4))
    up = noise("up", (shape[0], 2 * shape[1], 2 * shape[2], 4))

    def plain(x, kernel):
        return layers.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), kernel)

    @jax.jit
    def compute(x, kernel, up):
        pairs = (jax.vjp(f, x, kernel) for f in (layers.upsample_conv, plain))
        return [(out, *vjp(up)) for out, vjp in pairs]

    for ours, theirs in zip(*compute(x, kernel, up), strict=True):
        helpers.assert_close(ours, theirs, 1e-6)


def written_out_convolution(x, kernel, stride):
    """Sum over taps with zero padding of size // 2 on every side, in float64."""
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    padded = np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = (-(-n // stride) for n in x.shape[1:3])
    out = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for row, column in itertools.product(range(height), range(width)):
        i, j = row * stride, column * stride
        patch = padded[:, i : i + size, j : j + size]
        out[:, row, column] = np.tensordot(patch, kernel, 3)
    return out


@pytest.mark.parametrize("image", [(4, 4), (5, 6)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2), (7, 2)])
def test_padding_is_symmetric_at_any_stride(size, stride, image):
    # XLA's 'SAME' pads an even image at stride 2 on one side only.
    x = noise("x", (2, *image, 3))
    layer = layers.Conv(4, size, stride, use_bias=True)
    kernel, bias = noise("k", (size, size, 3, 4)), noise("b", (4,))
    found = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    expected = written_out_convolution(x, kernel, stride) + bias
    helpers.assert_close(found, expected, 1e-6)


@pytest.mark.parametrize(
    ("layer", "shape", "bounds"),
    [
        (layers.Conv(64), (1, 8, 8, 32), {"kernel": (6 / 288) ** 0.5}),
        (
            layers.UpsampleConv(64),
            (1, 4, 4, 32),
            {"kernel": 288**-0.5, "bias": 288**-0.5},
        ),
        (layers.Dense(64), (1, 100), {"kernel": 0.1, "bias": 0.1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_initial_weights_fill_their_bounds(layer, shape, bounds):
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros(shape))["params"]
    assert params.keys() == bounds.keys()
    for name, bound in bounds.items():
        largest = float(jnp.abs(params[name]).max())
        assert 0.9 * bound < largest <= bound * (1 + 1e-6)


X = 3 * noise("x", (4, 3, 2, 5)) + 1
NORM = {
    "params": {"scale": noise("scale", (5,)), "bias": noise("bias", (5,))},
    "batch_stats": {"mean": noise("mean", (5,)), "var": noise("var", (5,)) ** 2},
}


def normalised(mean, var, epsilon):
    y = (np.float64(X) - mean) / np.sqrt(var + epsilon)
    return y * NORM["params"]["scale"] + NORM["params"]["bias"]


@pytest.mark.parametrize("epsilon", [1e-5, 0.8])
def test_batch_norm_uses_running_statistics_unless_they_are_mutable(epsilon):
    running = NORM["batch_stats"]
    found = layers.BatchNorm(epsilon).apply(NORM, X)
    expected = normalised(running["mean"], running["var"], epsilon)
    helpers.assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("epsilon", [1e-5, 0.8])
def test_batch_norm_moves_the_running_statistics_as_pytorch_does(epsilon):
    layer, running = layers.BatchNorm(epsilon), NORM["batch_stats"]
    apply = jax.jit(functools.partial(layer.apply, mutable=["batch_stats"]))
    found, moved = apply(NORM, X)
    pixels = np.float64(X).reshape(-1, 5)
    # Normalised by the biased variance, moved by the unbiased one.
    expected = normalised(pixels.mean(0), pixels.var(0), epsilon)
    helpers.assert_close(found, expected, 1e-6)
    mean = 0.9 * running["mean"] + 0.1 * pixels.mean(0)
    var = 0.9 * running["var"] + 0.1 * pixels.var(0, ddof=1)
    helpers.assert_close(moved["batch_stats"]["mean"], mean, 1e-6)
    helpers.assert_close(moved["batch_stats"]["var"], var, 1e-6)


def test_batch_norm_without_scale_has_no_parameters():
    layer = layers.BatchNorm(use_scale=False)
    variables = layer.init(jax.random.key(0), X)
    assert variables.keys() == {"batch_stats"}
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_variance_survives_a_large_mean():
    # E[x^2] - E[x]^2 would lose it in float32.
    x = noise("x", (64, 3)) + 1000
    _, var = layers.moments(x)
    helpers.assert_close(var, np.float64(x).var(0), 1e-5)


def test_batch_statistics_over_devices_are_those_of_the_whole_batch():
    # Unequal content: the shares' means differ.
    x = X + np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    shared = layers.BatchNorm(axis_name="batch")

    def share(x):
        return shared.apply(NORM, x, mutable=["batch_stats"])

    split = jax.jit(jax.vmap(share, axis_name="batch"))
    found, moved = split(x.reshape(2, 2, 3, 2, 5))
    apply = functools.partial(layers.BatchNorm().apply, mutable=["batch_stats"])
    expected, whole = jax.jit(apply)(NORM, x)
    helpers.assert_close(found.reshape(x.shape), expected, 2e-6)
    for name in ("mean", "var"):
        ours, theirs = moved["batch_stats"][name], whole["batch_stats"][name]
        helpers.assert_close(ours, np.broadcast_to(theirs, ours.shape), 1e-6)
