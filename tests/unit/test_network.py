"""The traced network: what is found in a jaxpr, and its evaluation with hooks."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adadfq_jax
from adadfq_jax import models, quant
from adadfq_jax.errors import InputError
from adadfq_jax.network import Hooks, as_function, kernels, run, run_block, trace
from tests.golden.fill import noise


@pytest.fixture(autouse=True)
def strict():
    """Nothing: Flax's own layers broadcast, and networks of users may."""


# Kernels, activations and batch norms of every kind of network in the package.
COUNTS = {
    "tiny": (3, 2, 2),
    "resnet20": (22, 19, 21),
    "resnet32a": (32, 31, 31),
    "resnet56a": (56, 55, 55),
    "resnet18": (21, 17, 20),
    "resnet50": (54, 49, 53),
    "resnet50b": (54, 49, 53),
    "mobilenetv2_w1": (54, 36, 53),
    "mobilenet_v2": (53, 35, 52),
    "mobilenetv2_small": (26, 17, 25),
}
BLOCKS = {"resnet20": 11, "resnet18": 10, "mobilenet_v2": 33}


def of_package(name):
    """A network of the package as a function, the shapes of its variables, images'."""
    imagenet = name in ("resnet18", "resnet50", "resnet50b", "mobilenetv2_w1")
    shape = (224, 224, 3) if imagenet or name == "mobilenet_v2" else (32, 32, 3)
    model = models.get_model(name, num_classes=10)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return model.apply, variables, shape


@pytest.mark.parametrize("name", COUNTS)
def test_our_networks_have_the_quantizers_that_they_place_themselves(name):
    apply, variables, shape = of_package(name)
    graph = trace(apply, variables, image_shape=shape)
    found = len(graph.kernels), len(graph.activations), len(graph.batch_norms)
    assert found == COUNTS[name]
    assert len(graph.blocks) == BLOCKS.get(name, len(graph.blocks))
    assert [k for b in graph.blocks for k in b.kernels] == [
        k.name for k in graph.kernels
    ]
    assert all(norm.name.endswith("bn") for norm in graph.batch_norms)
    params = variables["params"]
    for kernel in graph.kernels:
        leaf = params
        for part in kernel.name.split("."):
            leaf = leaf[part]
        assert leaf.shape == kernel.shape
        assert kernel.out_axes == (len(kernel.shape) - 1,)


class Plain(nn.Module):
    """As people write it: Flax's own layers, a train argument, SiLU, a residual."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, epsilon=1e-3)(x)

        x = nn.silu(norm(nn.Conv(8, (3, 3), use_bias=False)(x)))
        y = nn.relu(norm(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.relu(x + norm(nn.Conv(8, (1, 1))(y)))
        gate = nn.sigmoid(nn.Dense(8)(nn.relu(nn.Dense(2)(x.mean((1, 2))))))
        x = nn.avg_pool(x * gate[:, None, None], (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def plain():
    model = Plain()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    rng = np.random.default_rng(0)
    statistics = jax.tree.map(
        lambda leaf: np.asarray(rng.uniform(0.5, 1.5, leaf.shape), np.float32),
        variables["batch_stats"],
    )
    variables = {"params": variables["params"], "batch_stats": statistics}
    graph = trace(model.apply, variables, image_shape=(8, 8, 3))
    return model, variables, graph


def images_of(count, shape=(8, 8, 3)):
    rng = np.random.default_rng(count)
    return jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32)


def test_an_unmodified_linen_network(plain):
    _, _, graph = plain
    assert len(graph.kernels) == 6 and len(graph.batch_norms) == 3
    # SiLU, ReLU, the sum's ReLU, the gated product and the gate's ReLU.
    assert len(graph.activations) == 5
    reasons = [kernel.reason for kernel in graph.kernels if kernel.reason]
    assert reasons == ["the image"]
    assert graph.kernels[1].activation == "Conv_1.kernel:input"
    assert "not quantized: the image" in str(graph) and "6 kernels" in str(graph)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_without_hooks_it_is_the_network(plain, count):
    model, variables, graph = plain
    images = images_of(count)
    logits, collected = jax.jit(lambda v, x: run(graph, v, x))(variables, images)
    expected = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    assert collected == {}


def test_blocks_one_after_the_other_are_the_network(plain):
    model, variables, graph = plain

    @jax.jit
    def compute(variables, x):
        expected = model.apply(variables, x)
        for index, block in enumerate(graph.blocks):
            x = run_block(graph, index, variables, x)
            assert x.shape[1:] == block.shape
        return x, expected

    np.testing.assert_allclose(*compute(variables, images_of(3)), rtol=1e-5)


def test_batch_norms_are_collected_with_their_statistics(plain):
    _, variables, graph = plain

    def moments(entry, x, mean, variance):
        axes = tuple(i for i in range(x.ndim) if i != entry.axis)
        return x.mean(axes), mean, variance

    _, collected = run(graph, variables, images_of(4), Hooks(batch_norm=moments))
    assert len(collected) == 3
    for entry, (found, mean, variance) in zip(
        graph.batch_norms, collected.values(), strict=True
    ):
        stored = variables["batch_stats"][entry.name]
        np.testing.assert_array_equal(mean, stored["mean"])
        np.testing.assert_array_equal(variance, stored["var"])
        assert found.shape == mean.shape


def test_hooks_see_each_entry_once_and_gradients_pass(plain):
    _, variables, graph = plain
    seen = []

    def activation(entry, x):
        seen.append(entry.name)
        return quant.fake_quant(x, jnp.float32(-1), jnp.float32(3), 4)

    def loss(params):
        changed = {**variables, "params": params}
        own = {
            name: quant.fake_quant_kernel(w, 4)
            for name, w in kernels(graph, changed).items()
        }
        hooks = Hooks(kernels=own, activation=activation)
        logits, _ = run(graph, changed, images_of(3), hooks)
        return jnp.sum(logits**2)

    grads = jax.device_get(jax.jit(jax.grad(loss))(variables["params"]))
    assert seen == [a.name for a in graph.activations]
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads["Conv_1"]))


def test_kernels_of_a_bfloat16_network_are_quantized_before_the_conversion():
    model = nn.Sequential(
        [nn.Conv(4, (3, 3), dtype=jnp.bfloat16), nn.relu, nn.Conv(3, (8, 8), padding=0)]
    )
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

    def apply(variables, images):
        return model.apply(variables, images).reshape(images.shape[0], -1)

    graph = trace(apply, variables, image_shape=(8, 8, 3))
    own = kernels(graph, variables)
    logits, _ = run(graph, variables, images_of(2), Hooks(kernels=own))
    first = own["layers_0.kernel"]
    assert first.dtype == jnp.float32
    np.testing.assert_array_equal(first, variables["params"]["layers_0"]["kernel"])
    np.testing.assert_array_equal(logits, apply(variables, images_of(2)))


def dense(variables, x):
    return jnp.maximum(x.reshape(x.shape[0], -1), 0) @ variables["w"]


WEIGHTS = {"w": np.ones((192, 5), np.float32)}


def scanned(variables, x):
    def one(x, _):
        return jnp.maximum(x @ variables["u"], 0), None

    flat = x.reshape(x.shape[0], -1)
    return jax.lax.scan(one, flat, length=2)[0] @ variables["w"]


@pytest.mark.parametrize(
    ("network", "variables", "message"),
    [
        (lambda v, x: dense(WEIGHTS, x), {}, "pass the variables as an argument"),
        (lambda v, x: x.mean((1, 2)) * v["w"][0, 0], WEIGHTS, "has no kernel"),
        (lambda v, x: x.reshape(x.shape[0], -1) @ v["w"], WEIGHTS, "no nonlinearity"),
        (lambda v, x: dense(v, x)[0], WEIGHTS, r"output is \(5,\)"),
        (lambda v, x: (dense(v, x), x), WEIGHTS, "must give one array"),
        (
            lambda v, x: dense(v, x - x.mean((0, 1, 2))),
            WEIGHTS,
            "over the images of a batch",
        ),
        (
            scanned,
            {**WEIGHTS, "u": np.ones((192, 192), np.float32)},
            "inside a loop",
        ),
        (lambda v, x: dense(v, x[..., :2]), WEIGHTS, "cannot be applied"),
        (
            lambda v, x: jax.lax.platform_dependent(v, x, cpu=dense, tpu=dense),
            WEIGHTS,
            "platform_dependent without .* give it a default",
        ),
    ],
    ids=range(9),
)
def test_what_cannot_be_quantized_is_refused_in_one_line(network, variables, message):
    with pytest.raises(InputError, match=message) as refused:
        trace(network, variables, image_shape=(8, 8, 3))
    assert "\n" not in str(refused.value)


def test_axes_of_any_length_are_not_taken_for_the_batch():
    """Axes of variables, and axes that only a computed value has."""
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.normal(size=(192, 422)).astype(np.float32),
        "last": rng.normal(size=(422, 211)).astype(np.float32),
    }

    def network(v, x):
        x = jnp.pad(x, ((0, 0), (0, 215), (0, 0), (0, 0)))  # an axis of 223
        x = jnp.maximum(x, jnp.max(x, 1, keepdims=True))[:, :8]
        hidden = jnp.maximum(x.reshape(x.shape[0], -1) @ v["first"], 0)
        return hidden @ v["last"]

    graph = trace(network, weights, image_shape=(8, 8, 3))
    assert (graph.num_classes, graph.traced_batch) == (211, 227)
    assert [kernel.shape for kernel in graph.kernels] == [(192, 422), (422, 211)]
    logits, _ = run(graph, weights, images_of(2))
    np.testing.assert_allclose(logits, network(weights, images_of(2)), rtol=1e-4)


def test_a_final_softmax_is_cut_off():
    graph = trace(
        lambda v, x: jax.nn.softmax(dense(v, x)), WEIGHTS, image_shape=(8, 8, 3)
    )
    logits, _ = run(graph, WEIGHTS, images_of(2))
    np.testing.assert_allclose(logits, dense(WEIGHTS, images_of(2)), rtol=1e-6)
    assert "softmax was cut off" in str(graph)


def maxima_of_groups(x):
    """The largest of each three logits; subtracting it changes the softmax."""
    tops = x.reshape(-1, 2, 3).max(2, keepdims=True)
    return jnp.broadcast_to(tops, (len(x), 2, 3)).reshape(x.shape)


@pytest.mark.parametrize(
    "subtracted",
    [maxima_of_groups, lambda x: 2 * x[:, :1] * jnp.arange(x.shape[1])],
)
def test_what_is_subtracted_before_a_final_softmax_is_kept(subtracted):
    def logits(v, x):
        x = dense(v, x)
        return x - subtracted(x)

    def network(v, x):
        powers = jnp.exp(logits(v, x))
        return powers / powers.sum(1, keepdims=True)

    weights = {"w": noise("six logits", (192, 6))}
    graph = trace(network, weights, image_shape=(8, 8, 3))
    found, _ = run(graph, weights, images_of(2))
    np.testing.assert_allclose(found, logits(weights, images_of(2)), rtol=1e-4)


def test_images_may_come_channels_first():
    def network(variables, x):
        return dense(variables, x.transpose(0, 2, 3, 1))

    graph = trace(network, WEIGHTS, image_shape=(8, 8, 3), layout="NCHW")
    logits, _ = run(graph, WEIGHTS, images_of(2))
    np.testing.assert_allclose(logits, dense(WEIGHTS, images_of(2)), rtol=1e-6)


class Nnx(nnx.Module):
    """With a batch norm and dropout, in training mode as it is made."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        return self.head(self.dropout(x.mean((1, 2))))


def test_an_nnx_module_is_traced_in_inference_and_left_as_it_is():
    model = Nnx(nnx.Rngs(0))
    graph = adadfq_jax.trace(model, image_shape=(8, 8, 3))
    assert [k.name for k in graph.kernels] == ["conv.kernel", "head.kernel"]
    assert [n.name for n in graph.batch_norms] == ["bn"]
    assert not model.bn.use_running_average and not model.dropout.deterministic


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Callable:
    """A pytree that is called with a batch; a number among its leaves."""

    first: jax.Array
    last: jax.Array
    slope: float

    def __call__(self, x):
        x = jnp.einsum("oi,bi->bo", self.first, x.reshape(x.shape[0], -1))
        return jnp.where(x > 0, x, self.slope * x) @ self.last


def test_any_pytree_that_can_be_called():
    network = Callable(jnp.ones((16, 192)), jnp.ones((16, 5)), 0.1)
    function, variables, *_ = as_function(network)
    assert set(variables) == {"first", "last"}
    graph = adadfq_jax.trace(network, image_shape=(8, 8, 3))
    assert [(k.name, k.out_axes) for k in graph.kernels] == [
        ("first", (0,)),
        ("last", (1,)),
    ]
    assert [a.name for a in graph.activations] == ["last:input"]
    logits, _ = run(graph, variables, images_of(2))
    np.testing.assert_allclose(logits, function(variables, images_of(2)), rtol=1e-5)


def test_variables_that_have_one_path_in_two_collections_keep_theirs():
    variables = {"params": dict(WEIGHTS), "batch_stats": {"w": np.ones(5, np.float32)}}
    graph = adadfq_jax.trace(
        lambda v, x: dense(v["params"], x) + v["batch_stats"]["w"][None],
        variables,
        image_shape=(8, 8, 3),
    )
    assert (graph.parameters, graph.variables) == (
        ("params.w",),
        ("batch_stats.w", "params.w"),
    )


@pytest.mark.parametrize(
    ("network", "variables", "message"),
    [
        (3, None, "int cannot be called"),
        (dense, None, "variables=None: the function takes them"),
        (Plain(), None, "variables=None: Plain is a Linen module"),
        (Nnx(nnx.Rngs(0)), {}, "variables: leave them out, Nnx is an NNX module"),
    ],
    ids=range(4),
)
def test_what_is_no_network_is_refused(network, variables, message):
    with pytest.raises(InputError, match=message):
        adadfq_jax.trace(network, variables, image_shape=(8, 8, 3))


@pytest.mark.parametrize(
    ("name", "activations"), [("resnet20", 32), ("mobilenetv2_small", 31), ("tiny", 4)]
)
def test_everywhere_is_what_integer_hardware_computes(name, activations):
    """The image, what enters a product, and both sides of every sum.

    Of ResNet-20: 19 outputs of ReLUs, the image, the pooled features, and 9 branches
    and 2 shortcuts that are summed.
    """
    apply, variables, shape = of_package(name)
    graph = trace(apply, variables, image_shape=shape, places="all")
    assert len(graph.activations) == activations
    assert len({entry.name for entry in graph.activations}) == activations
    assert graph.activations[0].name == "init_block.conv.kernel:input"
    assert graph.activations[0].shape == shape  # the image
    assert graph.quantized_share == 1
    assert all(not kernel.reason for kernel in graph.kernels)
    assert [a for block in graph.blocks for a in block.activations] == [
        entry.name for entry in graph.activations
    ]


def test_everywhere_the_image_is_changed_too(plain):
    model, variables, _ = plain
    graph = trace(
        model.apply, variables, image_shape=plain[2].image_shape, places="all"
    )
    seen = []

    def activation(entry, x):
        seen.append(entry.name)
        return 2 * x if entry is graph.activations[0] else x

    images = images_of(2)
    logits, _ = run(graph, variables, images, Hooks(activation=activation))
    assert seen == [entry.name for entry in graph.activations]
    np.testing.assert_allclose(logits, model.apply(variables, 2 * images), rtol=1e-4)


def test_another_rule_is_refused():
    apply, variables, shape = of_package("tiny")
    with pytest.raises(InputError, match="places='some': must be one of nonlin"):
        trace(apply, variables, image_shape=shape, places="some")


def test_variables_that_are_missing_or_of_another_shape_are_refused(plain):
    _, variables, graph = plain
    named_ = dict(zip(graph.variables, jax.tree.leaves(variables), strict=True))
    name = graph.kernels[0].name
    with pytest.raises(InputError, match="some that the network needs are missing"):
        run(graph, {k: v for k, v in named_.items() if k != name}, images_of(1))
    with pytest.raises(InputError, match=rf"{name} is \(3,\)"):
        run(graph, {**named_, name: jnp.zeros(3)}, images_of(1))
    # What only kernels are computed from is not needed where these are given.
    own = kernels(graph, named_)
    beside = {k: named_[k] for k in graph.beside_kernels}
    assert name not in beside
    logits, _ = run(graph, beside, images_of(2), Hooks(own))
    np.testing.assert_allclose(
        logits, run(graph, variables, images_of(2))[0], rtol=1e-5
    )
