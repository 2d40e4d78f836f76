r"""ResNet-50 on ImageNet, with the released hyperparameters.

    python -m adadfq_jax.main --config=configs/imagenet_resnet50.py:w4a4 \
        --workdir=runs/resnet50-w4a4 --config.teacher.path=resnet50.pth

P is a file in the names of pytorchcv (the paper's, stride in the first 1x1) or of
torchvision or timm (stride in the 3x3): the names decide, which the log says, and
--config.teacher.model=resnet50 or resnet50b overrides.

Nothing is measured until --config.eval.data_dir names a folder with a folder of images
for each class (the 50,000 validation images), or --config.eval.dataset=imagenet2012 the
set that TFDS prepared: shorter side to 256 pixels, centre crop of 224.

80,000 steps of 16 images.

The paper's figures, best-on-test: P 77.73 %; W3A3 17.63 %, W4A4 68.38 %, W5A5 76.03 %.

Argument: wKaK with any K from 2 to 8 for kernels and activations, then options: `tpu`
plays the same number of images in batches of 128 (`config.enlarge_batch`).
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """The configuration for 'wKaK[,tpu]'."""
    weight_bits, act_bits, options = base.parse_argument(argument, "w4a4", ("tpu",))
    config = base.imagenet_config(weight_bits, act_bits)

    config.teacher.expected_top1 = 77.73

    # The released values differ with the bits: those of W3, W4 and W5.
    few, many = weight_bits <= 3, weight_bits >= 5
    epoch = base.STEPS_PER_EPOCH
    config.game.warmup_steps = (100 if few else 50) * epoch
    drops = (150, 300) if few else (350,) if many else (200, 300)
    config.game.rate_drops = tuple(drop * epoch for drop in drops)
    config.game.q_rate = 1e-4
    config.game.lambda_l = 0.4 if few else 0.3
    config.game.alpha_ds = 0.2 if few or many else 0.1

    if "tpu" in options:
        base.enlarge_batch(config, 128)
    return config
