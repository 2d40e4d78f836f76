r"""ResNet-20 on Fashion-MNIST: the embedded default, nothing to download.

    python -m adadfq_jax.main --config=configs/fashion_mnist_resnet20.py:w4a4 \
        --workdir=/tmp/w4a4

A run has a game of 100 steps, then 200 iterations for each of 11 blocks, and takes 3 to
4 minutes on 2 cores. P's top-1 is 93.36 %. The recipe is `best`; docs/results
has the results of others.

Argument: wKaK, with any K from 2 to 8 for kernels and activations, then options:
`paper` takes the released CIFAR schedule of 400 x 200 steps.
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK[,paper]'."""
    weight_bits, act_bits, options = base.parse_argument(argument, "w4a4", ("paper",))
    config = base.default_config()

    config.teacher.path = str(base.ASSETS / "fashion_mnist_resnet20.safetensors")
    config.teacher.model = "resnet20"
    config.teacher.num_classes = 10
    config.teacher.image_shape = (28, 28, 1)
    config.teacher.mean = (0.2860,)
    config.teacher.std = (0.3530,)
    config.teacher.expected_top1 = 93.36

    config.quant.weight_bits = weight_bits
    config.quant.act_bits = act_bits

    config.recipe = "adadfq" if "paper" in options else "best"

    config.eval.dataset = "fashion_mnist"
    config.eval.data_dir = str(base.ASSETS)
    return config
