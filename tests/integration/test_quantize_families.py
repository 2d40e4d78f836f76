"""Networks of users, unmodified: trained, exported, checked, saved and loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adadfq_jax
from adadfq_jax.network import named
from tests.network_families import FAMILIES, IMAGE, images_of

# Linen with a `train` argument, Linen with squeeze-and-excitation, NNX, Equinox, a
# function over a dictionary with names of its own, concatenations and shuffles.
NAMES = [
    "resnet",
    "squeeze_and_excitation",
    "flax_nnx",
    "equinox",
    "bare_function",
    "densenet",
    "shufflenet",
    "squeezenet",
]
# A few steps, in two programs: ranges are observed, then both train. Then each block.
QUICK = {
    "devices": 1,
    "game.generator_channels": 8,
    "game.batch_size": 4,
    "game.steps": 4,
    "game.observe_steps": 2,
    "game.warmup_steps": 2,
    "game.rate_drops": (),
    "game.q_rate": 1e-2,
    "reconstruction.iterations": 2,
    "reconstruction.images": 32,
    "reconstruction.batch_size": 8,
}


def quantize(network, variables=None, **others):
    return adadfq_jax.quantize(
        network,
        variables,
        image_shape=IMAGE,
        recipe="adadfq_short",
        weight_bits=5,
        act_bits=6,
        settings=QUICK,
        **others,
    )


def assert_it_is_saved_and_exported(network, folder, *given):
    record = network.export(folder)
    assert set(record["files"]) == {"onnx", "integer", "stablehlo"}
    assert all(made["same_class"] > 0.9 for made in record["files"].values())
    again = adadfq_jax.load_quantized(folder / "quantized.safetensors", *given)
    assert again.info == network.info
    images = images_of(3)
    np.testing.assert_array_equal(again(images), network(images))
    assert again.save(folder / "again").read_bytes() == again.path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_a_user_from_training_to_files(name, tmp_path):
    make, expected = FAMILIES[name]
    function, variables = make()
    layout = expected[-1]
    network = quantize(function, variables, layout=layout)
    kernels, activations, *_ = expected
    assert (len(network.kernels), len(network.ranges)) == (kernels, activations)
    own = named(variables)
    beside = network.variables.variables
    assert any(
        not np.array_equal(leaf, own[name]) for name, leaf in beside.items()
    )  # Q has been trained
    given = [function]
    if name in ("flax_nnx", "equinox"):  # whose trees are of classes of their own
        given.append(variables)
    assert_it_is_saved_and_exported(network, tmp_path, *given)


def test_variables_that_are_no_floats_and_bfloat16_inside(tmp_path):
    def network(v, x):
        y = jax.nn.relu(x.mean((1, 2)) @ v["a"])
        y = jnp.where(v["mask"], y, 0)[:, v["order"]].astype(jnp.bfloat16)
        y = jax.nn.relu(y @ v["b"].astype(jnp.bfloat16))
        return y.astype(jnp.float32) @ v["c"]

    rng = np.random.default_rng(0)
    variables = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"a": (3, 8), "b": (8, 8), "c": (8, 5)}.items()
    }
    variables |= {"mask": np.arange(8) % 3 > 0, "order": np.arange(8)[::-1].copy()}
    found = quantize(network, {**variables, "unused": jax.random.key(0)})
    record = found.export(tmp_path, onnx=False)  # no rule for bfloat16
    assert record["files"]["stablehlo"]["same_class"] > 0.9
    again = adadfq_jax.load_quantized(
        tmp_path / "quantized.safetensors",
        network,
        {**variables, "unused": jax.random.key(0)},
    )
    np.testing.assert_array_equal(again(images_of(3)), found(images_of(3)))


class Small(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.out(self.dropout(x.mean((1, 2))))


def test_an_nnx_module_is_given_alone(tmp_path):
    model = Small(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    network = quantize(model)
    assert network.info.model == "Small" and network.num_classes == 5
    assert sorted(network.kernels) == ["conv.kernel", "out.kernel"]
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert_it_is_saved_and_exported(network, tmp_path, model)
