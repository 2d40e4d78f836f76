"""Quantized networks as files, without a game."""

import functools

import jax
import numpy as np

from adadfq_jax import config, evaluation, game, models, teacher
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import NetworkInfo, function_of, graph_of
from adadfq_jax.evaluation.evaluator import normalise
from adadfq_jax.game import players
from adadfq_jax.network import named
from tests import helpers
from tests.golden.fill import fill

MEAN, STD = (0.2860,), (0.3530,)
TINY_SHAPE = (16, 16, 3)


@functools.cache
def fashion_mnist(count):
    """The first of the 10,000 embedded images with their labels."""
    return evaluation.load("fashion_mnist", str(config.ASSETS), f"test[:{count}]")


def fashion_mnist_images(count):
    """The first of them, in normalised space."""
    return np.asarray(normalise(fashion_mnist(count).images, MEAN, STD))


def save(path, info, variables, images, function=None, *, symmetric=False):
    """Writes P's variables as a Q whose ranges have seen one batch of images.

    variables: of a network of the package. function: another, with its variables.
    symmetric: whether kernels have symmetric ranges.
    """
    if function is None:
        function = function_of(info)._replace(variables=named(variables))
    graph = graph_of(info, function)
    options = info.options(graph, symmetric=symmetric)
    own = {name: function.variables[name] for name in graph.needed}
    p = game.with_clip_ratios(graph, own, options)

    @jax.jit
    def observe(p, images):
        q = players.quantize(graph, options, p, {}, players.init_ranges(graph))
        return players.q_observe(graph, options, q, images)[1]

    ranges = observe(p, images)
    network = quantized_file.freeze(
        *(p, {}, ranges),
        info=info,
        function=function,
        graph=graph,
        range_ema="corrected",
        symmetric=symmetric,
    )
    return network.save(path)


def save_fashion_mnist(path, *bits, model="resnet20"):
    """An embedded P as a Q, its ranges calibrated on 500 of the images.

    bits: of kernels and activations; of the first and last layer, if others.
    """
    info = NetworkInfo(model, 10, (28, 28, 1), MEAN, STD, *bits)
    variables = teacher.load(
        config.ASSETS / f"fashion_mnist_{model}.safetensors", model
    )
    return save(path, info, variables, fashion_mnist_images(500))


@functools.cache
def tiny():
    """Variables of a random `tiny`, and 64 images."""
    model = models.get_model("tiny", num_classes=10)
    images = np.random.default_rng(0).normal(size=(64, *TINY_SHAPE)).astype(np.float32)
    return jax.device_get(jax.jit(model.init)(jax.random.key(1), images)), images


def save_tiny(folder, bits):
    """It as a Q in a folder."""
    info = NetworkInfo("tiny", 10, TINY_SHAPE, (0.5,) * 3, (0.25,) * 3, bits, bits)
    return save(folder / "quantized.safetensors", info, *tiny())


def filled(info):
    """Variables of a network, filled by the keys of its state dict."""
    shapes = helpers.variable_shapes(info.model, info.num_classes, info.image_shape)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    keys = teacher.to_state_dict(zeros, info.model)
    state_dict = {key: fill(key, value.shape) for key, value in keys.items()}
    return teacher.from_state_dict(state_dict, info.model)
