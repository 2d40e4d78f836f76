r"""MobileNetV2 on ImageNet, with the released hyperparameters.

    python -m adadfq_jax.main --config=configs/imagenet_mobilenet_v2.py:w4a4 \
        --workdir=runs/mobilenet_v2-w4a4 --config.teacher.path=mobilenetv2_w1.pth

P is a file in the names of pytorchcv (`mobilenetv2_w1`, the paper's), torchvision or
timm (`mobilenet_v2`). The two forms are told apart by the names.

Nothing is measured until --config.eval.data_dir names a folder with a folder of images
for each class (the 50,000 validation images), or --config.eval.dataset=imagenet2012
chooses the set that TFDS prepared. The shorter side is resized to 256 pixels, and the
centre of 224 is kept.

The recipe is adadfq_imagenet_mobilenet_v2, with 80,000 steps of 16 images. Another
recipe, as in --config.recipe=best, brings its own batch, steps and rates.

The paper's figures, best-on-test: P 73.03 %; W3A3 28.99 %, W4A4 65.41 %, W5A5 71.61 %.

Argument: wKaK, with any K from 2 to 8 for kernels and activations, then options: `tpu`
trains on the same number of images in batches of 128, with the recipe
adadfq_imagenet_mobilenet_v2_tpu (`recipes.enlarge_batch`).
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK[,tpu]'."""
    weight_bits, act_bits, options = base.parse_argument(argument, "w4a4", ("tpu",))
    config = base.imagenet_config(weight_bits, act_bits)

    config.teacher.expected_top1 = 73.03

    config.recipe = "adadfq_imagenet_mobilenet_v2"
    if "tpu" in options:
        config.recipe += "_tpu"
    return config
