r"""ResNet-20 on CIFAR-100, with the released hyperparameters.

    python -m adadfq_jax.main --config=configs/cifar100_resnet20.py:w4a4 \
        --workdir=runs/cifar100-w4a4 --config.teacher.path=resnet20_cifar100.pth

P is the file of the pytorchcv model zoo, or any file with its names. Q is measured on
the TFDS set `cifar100` (in TFDS's folder, or in config.eval.data_dir); without one, add
--config.eval.enabled=False.

A run has 80,000 steps and takes 3 to 4 hours on 2 cores (7 steps a second). With
--config.recipe=best it takes minutes.

The paper's figures, best-on-test: P 70.33 %; W3A3 52.74 %, W4A4 66.81 %, W5A5 69.93 %.

Argument: wKaK, with any K from 2 to 8 for kernels and activations.
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK'."""
    weight_bits, act_bits, _ = base.parse_argument(argument, "w4a4")
    config = base.default_config()

    config.teacher.model = "resnet20"
    config.teacher.num_classes = 100
    config.teacher.image_shape = (32, 32, 3)
    config.teacher.mean = (0.50705882, 0.48666667, 0.44078431)
    config.teacher.std = (0.26745098, 0.25568627, 0.27607843)
    config.teacher.expected_top1 = 70.33

    config.quant.weight_bits = weight_bits
    config.quant.act_bits = act_bits

    # config.recipe: the default is adadfq, with the released CIFAR values.
    config.eval.dataset = "cifar100"
    config.eval.between = 9
    config.checkpoint.every = 1000
    return config
