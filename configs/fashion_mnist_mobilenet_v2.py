r"""A small MobileNetV2 on Fashion-MNIST: depthwise convolutions, nothing to download.

    python -m adadfq_jax.main --config=configs/fashion_mnist_mobilenet_v2.py:w4a4 \
        --workdir=/tmp/mobilenet-w4a4

The data is the same as for fashion_mnist_resnet20.py, but the network is of another
kind, which shows whether a recipe was tuned to one network. P's top-1 is 91.25 %. The
recipe is adadfq_tuned, which is better here than `best`; see docs/results.

Argument: wKaK, with any K from 2 to 8 for kernels and activations.
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK'."""
    weight_bits, act_bits, _ = base.parse_argument(argument, "w4a4")
    config = base.default_config()

    name = "mobilenetv2_small"
    config.teacher.path = str(base.ASSETS / f"fashion_mnist_{name}.safetensors")
    config.teacher.model = name
    config.teacher.num_classes = 10
    config.teacher.image_shape = (28, 28, 1)
    config.teacher.mean = (0.2860,)
    config.teacher.std = (0.3530,)
    config.teacher.expected_top1 = 91.25

    config.quant.weight_bits = weight_bits
    config.quant.act_bits = act_bits
    config.recipe = "adadfq_tuned"

    config.eval.dataset = "fashion_mnist"
    config.eval.data_dir = str(base.ASSETS)
    return config
