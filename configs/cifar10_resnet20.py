r"""ResNet-20 on CIFAR-10, with the released hyperparameters.

    python -m adadfq_jax.main --config=configs/cifar10_resnet20.py:w4a4 \
        --workdir=runs/cifar10-w4a4 --config.teacher.path=resnet20_cifar10.pth

P is the file of the pytorchcv model zoo, or any file with its names. Q is measured on
the TFDS set `cifar10` (in TFDS's folder, or in config.eval.data_dir); without one, add
--config.eval.enabled=False.

A run has 80,000 steps and takes 3 to 4 hours on 2 cores (7 steps a second). With
--config.recipe=best it takes minutes.

The paper's figures, best-on-test: P 93.89 %; W3A3 84.89 %, W4A4 92.31 %, W5A5 93.81 %.

Argument: wKaK, with any K from 2 to 8 for kernels and activations.
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK'."""
    weight_bits, act_bits, _ = base.parse_argument(argument, "w4a4")
    config = base.default_config()

    config.teacher.model = "resnet20"
    config.teacher.num_classes = 10
    config.teacher.image_shape = (32, 32, 3)
    config.teacher.mean = (0.49139968, 0.48215827, 0.44653124)
    config.teacher.std = (0.24703233, 0.24348505, 0.26158768)
    config.teacher.expected_top1 = 93.89

    config.quant.weight_bits = weight_bits
    config.quant.act_bits = act_bits

    # config.recipe: the default is adadfq, with the released CIFAR values.
    config.eval.dataset = "cifar10"
    config.eval.between = 9
    config.checkpoint.every = 1000
    return config
