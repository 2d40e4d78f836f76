"""Quantized networks as files, without a game."""

import functools

import jax
import numpy as np

from adadfq_jax import config, evaluation, quant, teacher
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import NetworkInfo, layer_bits, make_student
from adadfq_jax.evaluation.evaluator import normalise

MEAN, STD = (0.2860,), (0.3530,)


@functools.cache
def fashion_mnist():
    """The 10,000 embedded images with their labels."""
    return evaluation.load("fashion_mnist", str(config.ASSETS), "test")


def fashion_mnist_images(count=None):
    """The first of them, in normalised space."""
    return np.asarray(normalise(fashion_mnist().images[:count], MEAN, STD))


def save(path, info, variables, images, module=None):
    """Writes P's variables as a Q whose ranges have seen one batch of images.

    module: the network, where it is none of the package's.
    """
    model = make_student(info, module)
    ranges = jax.eval_shape(model.init, jax.random.key(0), images)["ranges"]
    start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), ranges)
    for leaf in jax.tree.leaves(
        start, is_leaf=lambda x: isinstance(x, quant.RangeState)
    ):
        leaf.decay_power[...] = 1
    quantized = {
        "params": quant.quantize_kernels(
            variables["params"], info.weight_bits, layer_bits=layer_bits(info, module)
        ),
        "batch_stats": variables["batch_stats"],
        "ranges": start,
    }
    observe = jax.jit(functools.partial(model.apply, mutable=["ranges"]))
    _, updates = observe(quantized, images)
    network = quantized_file.freeze(
        variables["params"],
        variables["batch_stats"],
        updates["ranges"],
        info=info,
        range_ema="corrected",
        model=module,
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
