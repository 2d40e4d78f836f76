"""Exports of networks from outside the package: names of Flax's, kernels used twice."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax.deploy import quantized_file, verify
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_onnx
from adadfq_jax.deploy.stablehlo_file import to_stablehlo
from adadfq_jax.errors import ExportError, InputError
from adadfq_jax.models import layers
from adadfq_jax.network import Hooks, as_function, run
from tests import jobs, quantized

SHAPE = (16, 16, 3)


class Unnamed(nn.Module):
    """Its layers have no names of their own."""

    @nn.compact
    def __call__(self, x):
        for features in (8, 12):
            x = layers.BatchNorm()(layers.Conv(features, stride=2)(x))
            x = nn.relu(x)
        return layers.Dense(10)(jnp.mean(x, (1, 2)))


class Twice(nn.Module):
    """A convolution before two batch norms, a dense layer that is the same twice."""

    @nn.compact
    def __call__(self, x):
        conv, dense = layers.Conv(3), layers.Dense(3)
        for _ in range(2):
            x = nn.relu(layers.BatchNorm()(conv(x)))
        x = nn.relu(dense(nn.relu(dense(jnp.mean(x, (1, 2))))))
        return layers.Dense(10)(x)


def avg_pool(*args, **kwargs):
    """Flax's own, which divides floats by a whole number."""
    with jax.numpy_dtype_promotion("standard"):
        return nn.avg_pool(*args, **kwargs)


class Various(nn.Module):
    """Branches, average pools, other activation functions, a global maximum."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(layers.BatchNorm()(layers.Conv(8)(x)))
        pooled = avg_pool(x, (3, 3), (1, 1), "SAME")
        inside = avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        branch = nn.leaky_relu(layers.BatchNorm()(layers.Conv(6)(x)))
        x = jnp.concatenate([(branch), pooled, x, inside], -1)
        x = nn.relu(layers.BatchNorm()(layers.Conv(12, stride=2)(x)))
        x = avg_pool((x), (2, 2), (2, 2))
        x = jnp.concatenate([jnp.max(x, (1, 2)), jnp.mean(x, (1, 2))], -1)
        return layers.Dense(10)(x)


def images_of(count):
    return np.random.default_rng(0).normal(size=(count, *SHAPE)).astype(np.float32)


def variables_of(model):
    """As at the start, but that every batch norm is another."""
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), images_of(1)))
    rng = np.random.default_rng(1)
    statistics = jax.tree.map(
        lambda leaf: rng.uniform(0.3, 1.5, leaf.shape).astype(np.float32),
        variables["batch_stats"],
    )
    return {"params": variables["params"], "batch_stats": statistics}


@pytest.fixture
def save(tmp_path):
    """Q of a network, read back."""

    def saved(model, bits, first_last_bits=0):
        name = type(model).__name__
        info = NetworkInfo(
            name, 10, SHAPE, (0,) * 3, (1,) * 3, bits, bits, first_last_bits
        )
        file = tmp_path / "quantized.safetensors"
        function = as_function(model, variables_of(model))
        quantized.save(file, info, None, images_of(32), function)
        return quantized_file.load_quantized(file, model)

    return saved


def assert_exports_agree(network):
    images = images_of(30)
    ours = np.asarray(network(images))
    model = to_onnx(network, OnnxOptions()).SerializeToString()
    for runner in (
        verify.onnx_runner(model, lambda x: x),
        verify.stablehlo_runner(to_stablehlo(network, pixels=False)),
    ):
        errors = np.abs(runner(images) - ours).max(-1) / ours.std(0).mean()
        assert np.median(errors) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "nchw"}, "layout='nchw': must be"),
        ({"target": "tensorrt"}, "target='tensorrt': must be"),
        ({"layuot": "NCHW"}, "layuot: no such setting; the nearest is export.layout"),
        ({"onnx": False, "stablehlo": False}, "nothing to export"),
        ({"target": "litert", "integer": False}, "target='litert': must be"),
    ],
)
def test_options_that_cannot_be_used(save, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        save(Unnamed(), 4).export(tmp_path / "files", **options)
    assert not (tmp_path / "files").exists()


def test_an_export_takes_the_place_of_an_earlier_one_or_changes_nothing(
    save, tmp_path, monkeypatch
):
    folder = tmp_path / "files"
    save(Unnamed(), 4).export(folder, stablehlo=False, integer=False)
    save(Unnamed(), 3).export(folder, onnx=False)
    expected = ["encodings.json", "export.json", "model_card.md"]
    expected += ["quantized.safetensors", "quantized.stablehlo"]
    assert jobs.tree(folder) == expected

    def refuse(*_):
        raise ExportError("other logits")

    monkeypatch.setattr(verify, "require_agreement", refuse)
    before = [(folder / name).read_bytes() for name in expected]
    with pytest.raises(ExportError, match="other logits"):
        save(Unnamed(), 2).export(folder, onnx=False)
    assert jobs.tree(folder) == expected
    assert [(folder / name).read_bytes() for name in expected] == before


@pytest.mark.parametrize("model", [Unnamed(), Twice(), Various()])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_networks_of_your_own(save, model, bits):
    assert_exports_agree(save(model, bits))


def test_the_ends_of_a_network(save):
    network = save(Unnamed(), 3, 8)
    expected = ("Conv_0.kernel", "Dense_0.kernel", "Dense_0.kernel:input")
    assert network.options.layer_bits == dict.fromkeys(expected, 8)
    assert network.kernels["Conv_0.kernel"].bits == 8
    assert_exports_agree(network)


def test_the_same_network_in_float32(save):
    network = save(Various(), 8)
    model = to_onnx(network, OnnxOptions(), quantized=False).SerializeToString()
    found = verify.onnx_runner(model, lambda x: x)(images_of(30))
    hooks = Hooks(network.variables.kernels)
    ours, _ = run(network.graph, network.variables.variables, images_of(30), hooks)
    np.testing.assert_allclose(found, ours, atol=1e-4 * np.std(ours))
