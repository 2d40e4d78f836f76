"""The traced network over families of networks, unmodified as their users write them.

Each is asserted to have so many kernels, activations and batch norms, a share of
multiplications with both operands quantized, and to be itself when it is run.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from adadfq_jax.errors import InputError
from adadfq_jax.network import Hooks, kernels, run, run_block, trace
from tests.network_families import (
    ENDINGS,
    FAMILIES,
    IMAGE,
    NO_NORMS,
    NONLINEARITIES,
    NORMS,
    Ending,
    attention,
    constant_blur,
    conv,
    flax_nnx,
    grouped_dilated_depthwise_transposed,
    images_of,
    linen,
    ones,
    with_norm,
)


@pytest.fixture(autouse=True)
def strict():
    """Nothing: networks of users broadcast, and so do Flax's own layers."""


@pytest.fixture(scope="module")
def traced():
    @functools.cache
    def one(name):
        make, expected = FAMILIES[name]
        function, variables = make()
        graph = trace(function, variables, image_shape=IMAGE, layout=expected[-1])
        return function, variables, graph

    return one


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_a_nonlinearity_is_quantized_once_behind_its_last_operation(name):
    function = NONLINEARITIES[name]
    model = nn.Sequential(
        [nn.Conv(4, (3, 3)), function, nn.Conv(5, (16, 16), strides=16)]
    )
    network, variables = linen(model)

    def logits(v, x):
        return network(v, x).reshape(x.shape[0], -1)

    graph = trace(logits, variables, image_shape=IMAGE)
    assert len(graph.kernels) == 2 and len(graph.activations) == 1
    seen = {}

    def activation(entry, x):
        seen[entry.name] = x
        return x

    found, _ = run(graph, variables, images_of(2), Hooks(activation=activation))
    (tensor,) = seen.values()
    first = nn.Conv(4, (3, 3)).apply(
        {"params": variables["params"]["layers_0"]}, images_of(2)
    )
    # A linear factor at the end is quantized before or after: the integers are equal.
    expected, tensor = np.asarray(function(first)), np.asarray(tensor)
    scale = np.sum(expected * tensor) / np.maximum(np.sum(tensor**2), 1e-9)
    np.testing.assert_allclose(scale * tensor, expected, rtol=1e-4, atol=1e-5)
    expected = logits(variables, images_of(2))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_multiplications_are_counted():
    _, variables = grouped_dilated_depthwise_transposed()
    function, _ = grouped_dilated_depthwise_transposed()
    graph = trace(function, variables, image_shape=IMAGE)
    assert [kernel.multiplications for kernel in graph.kernels] == [
        8 * 8 * 8 * 9 * 3,
        8 * 8 * 8 * 9 * 2,
        8 * 8 * 8 * 9 * 8,
        8 * 8 * 16 * 9,
        8 * 8 * 16 * 4 * 4 * 4,  # of the pixels of its input
        4 * 5,
    ]


@pytest.mark.parametrize("name", NORMS)
def test_a_batch_norm_is_found_however_it_is_written(name):
    network, variables = with_norm(NORMS[name])
    graph = trace(network, variables, image_shape=IMAGE)
    assert [(norm.name, norm.axis) for norm in graph.batch_norms] == [("m", 3)]

    def collect(entry, x, mean, variance):
        return x, mean, variance

    _, found = run(graph, variables, images_of(2), Hooks(batch_norm=collect))
    ((x, mean, variance),) = found.values()
    np.testing.assert_allclose(x, conv(images_of(2), variables["k"]), atol=1e-5)
    np.testing.assert_array_equal(mean, variables["m"])
    np.testing.assert_array_equal(variance, variables["v"])


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_no_batch_norm(name):
    network, variables = with_norm(NO_NORMS[name])
    assert not trace(network, variables, image_shape=IMAGE).batch_norms


def test_output_channels_of_kernels():
    def out_axes(name):
        function, variables = FAMILIES[name][0]()
        layout = FAMILIES[name][1][-1]
        graph = trace(function, variables, image_shape=IMAGE, layout=layout)
        return [kernel.out_axes for kernel in graph.kernels]

    assert out_axes("channels_first") == [(0,), (0,), (1,)]  # its transposed kernel
    assert out_axes("vmapped") == [(0,), (0,), (0,)]
    assert out_axes("bare_function") == [(3,), (3,), (1,)]
    assert out_axes("attention") == [(3,), *[(1, 2)] * 3, (2,), (1,)]
    assert out_axes("block_diagonal") == [(3,), (0, 2), (1,)]


def test_names_of_nnx_are_paths():
    function, state = flax_nnx()
    graph = trace(function, state, image_shape=IMAGE)
    assert [k.name for k in graph.kernels][:2] == ["conv1.kernel", "conv2.kernel"]
    assert [norm.name for norm in graph.batch_norms] == ["bn1", "bn2"]


def test_names_are_whole_paths():
    function, variables = attention()
    graph = trace(function, variables, image_shape=IMAGE)
    names = [k.name.removesuffix(".kernel").split(".")[-1] for k in graph.kernels]
    assert names == ["Conv_0", "query", "key", "value", "out", "Dense_0"]


def test_products_of_two_activations_stay_in_float_with_their_reason():
    function, variables = attention()
    graph = trace(function, variables, image_shape=IMAGE)
    assert [x.reason for x in graph.products] == ["a product of two activations"] * 2
    assert [x.multiplications for x in graph.products] == [16 * 16 * 8] * 2
    assert graph.kernels[4].reason == "a product of two activations"
    assert "(product)" in str(graph)
    total = sum(x.multiplications for x in (*graph.kernels, *graph.products))
    assert graph.multiplications == total


def test_a_constant_kernel_stays_in_float_with_its_reason():
    function, variables = constant_blur()
    graph = trace(function, variables, image_shape=IMAGE)
    assert [x.reason for x in graph.products] == ["its kernel is a constant"]
    assert graph.quantized_share < 0.01


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ENDINGS)
def test_a_final_softmax_is_cut_off_however_it_is_written(name, dtype):
    model = Ending(ENDINGS[name], dtype)
    function, variables = linen(model)
    graph = trace(function, variables, image_shape=IMAGE)
    assert "softmax was cut off" in str(graph)
    logits, _ = run(graph, variables, images_of(3))
    expected = model.apply(variables, images_of(3), logits=True)
    assert logits.dtype == function(variables, images_of(3)).dtype
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


# What holds of all of them.


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_found(traced, name):
    _, _, graph = traced(name)
    kernels, activations, batch_norms, share, blocks, _ = FAMILIES[name][1]
    found = len(graph.kernels), len(graph.activations), len(graph.batch_norms)
    assert found == (kernels, activations, batch_norms), str(graph)
    assert graph.quantized_share == pytest.approx(share, abs=1e-4)
    if blocks is not None:
        assert len(graph.blocks) == blocks
    assert [k for b in graph.blocks for k in b.kernels] == [
        k.name for k in graph.kernels
    ]
    made = [x for block in graph.blocks for x in block.activations]
    assert sorted(made) == sorted(x.name for x in graph.activations)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_network_and_so_are_its_blocks(traced, name):
    function, variables, graph = traced(name)
    counts = (1, 5)

    @jax.jit
    def compute(variables, batches):
        found = []
        for images, own in batches:
            x, outputs = images, []
            for index in range(len(graph.blocks)):
                x = run_block(graph, index, variables, x)
                outputs.append(x)
            logits, _ = run(graph, variables, images)
            found.append((logits, function(variables, own), outputs))
        return found

    batches = [(images_of(count), images_of(count, graph.layout)) for count in counts]
    computed = compute(variables, batches)
    for count, (logits, expected, outputs) in zip(counts, computed, strict=True):
        np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=1e-4)
        shapes = [x.shape for x in outputs]
        assert shapes == [(count, *block.shape) for block in graph.blocks]
        half = expected.dtype == jnp.bfloat16
        size = np.max(np.abs(np.asarray(expected, np.float32)))
        atol = float(size) * (2e-2 if half else 1e-4)
        np.testing.assert_allclose(outputs[-1], expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_change_what_they_are_given_and_gradients_pass(traced, name):
    _, variables, graph = traced(name)
    seen = []

    own = kernels(graph, variables)
    assert {name: w.shape for name, w in own.items()} == {
        entry.name: entry.shape for entry in graph.kernels
    }
    assert all(w.dtype == jnp.float32 for w in own.values())

    def activation(entry, x):
        assert x.size == 3 * np.prod(entry.shape)
        seen.append(entry.name)
        return x.astype(jnp.float32)

    def batch_norm(entry, x, mean, variance):
        assert mean.shape == variance.shape == (x.shape[entry.axis],)
        assert x.size == 3 * np.prod(entry.shape)
        return entry.name

    hooks = Hooks(own, activation=activation, batch_norm=batch_norm)

    def loss(images):
        logits, norms = run(graph, variables, images, hooks)
        assert list(norms) == [norm.name for norm in graph.batch_norms]
        return jnp.sum(logits.astype(jnp.float32) ** 2)

    gradient = np.asarray(jax.jit(jax.grad(loss))(images_of(3)))
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)
    assert sorted(seen) == sorted(a.name for a in graph.activations)


# Refusals.

WEIGHTS = {"w": np.ones((768, 5), np.float32)}


def dense(v, x):
    return jnp.maximum(x.reshape(x.shape[0], -1), 0) @ v["w"]


def branched(v, x):
    return lax.cond(x.sum() > 0, lambda: dense(v, x), lambda: dense(v, -x))


def other_at_two(v, x):
    return dense(
        v, jnp.tanh(x) if x.shape[0] == 2 else dense(v, x)[:, :1, None, None] * x
    )


@pytest.mark.parametrize(
    ("network", "variables", "message"),
    [
        (lambda v, x: dense(v, x), {**WEIGHTS, "f": jax.nn.relu}, "f is no array"),
        (lambda v, x: dense(v, x), {**WEIGHTS, "f": "relu"}, "f is no array"),
        (branched, WEIGHTS, r"\(cond\)|over the images"),
        (
            lambda v, x: conv(v["k"], x),
            {"k": ones(1, 4, 4, 3)},
            "kernel of a conv|appl",
        ),
        (lambda v, x: dense(v, x - x.max()), WEIGHTS, "over the images"),
        (lambda v, x: dense(v, x).T @ dense(v, x), WEIGHTS, "its output"),
        (lambda v, x: v["w"][:2], WEIGHTS, "its output"),
        (lambda v, x: x, WEIGHTS, "its output"),
        (lambda v, x: None, WEIGHTS, "one array"),
        (lambda v: v, WEIGHTS, "cannot be applied"),
        (lambda v, x: dense(v, x) if x[0, 0, 0, 0] else x, WEIGHTS, "be applied"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_take_one_line(network, variables, message):
    with pytest.raises(InputError, match=message) as refused:
        trace(network, variables, image_shape=IMAGE)
    assert "\n" not in str(refused.value)


def test_a_network_that_depends_on_the_number_of_images_is_refused():
    graph = trace(other_at_two, WEIGHTS, image_shape=IMAGE)
    run(graph, WEIGHTS, images_of(3))
    with pytest.raises(InputError, match="not the same for 2 images"):
        run(graph, WEIGHTS, images_of(2))


@pytest.mark.parametrize("shape", [(16, 16), (0, 16, 3), (16, 16, 3, 1)])
def test_the_shape_of_an_image_is_three_numbers(shape):
    with pytest.raises(InputError, match="image_shape"):
        trace(dense, WEIGHTS, image_shape=shape)


def test_a_loop_over_variables_is_no_obstacle_and_one_tensor_has_a_name():
    def network(w, x):
        w = lax.fori_loop(0, 2, lambda _, w: w / jnp.linalg.norm(w.T @ w), w)
        return dense({"w": w}, x)

    graph = trace(network, WEIGHTS["w"], image_shape=IMAGE)
    assert [kernel.name for kernel in graph.kernels] == ["variables"]
