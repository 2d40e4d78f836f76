r"""A small MobileNetV2 on Fashion-MNIST: the second embedded network.

    python -m adadfq_jax.main --config=configs/fashion_mnist_mobilenet_v2.py:w4a4 \
        --workdir=/tmp/mobilenet-w4a4

1,000 steps. A network of 88,650 parameters, with depthwise convolutions and linear
bottlenecks, which few bits hurt more than a ResNet.

Argument: wKaK with any K from 2 to 8 for kernels and activations.
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """The configuration for 'wKaK'."""
    weight_bits, act_bits, _ = base.parse_argument(argument, "w4a4")
    config = base.default_config()
    config.recipe = "adadfq_short"

    config.teacher.path = str(
        base.ASSETS / "fashion_mnist_mobilenetv2_small.safetensors"
    )
    config.teacher.model = "mobilenetv2_small"
    config.teacher.num_classes = 10
    config.teacher.image_shape = (28, 28, 1)
    config.teacher.mean = (0.2860,)
    config.teacher.std = (0.3530,)

    config.quant.weight_bits = weight_bits
    config.quant.act_bits = act_bits

    config.eval.dataset = "fashion_mnist"
    config.eval.data_dir = str(base.ASSETS)
    return config
