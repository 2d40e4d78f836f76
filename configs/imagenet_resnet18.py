r"""ResNet-18 on ImageNet, with the released hyperparameters.

    python -m adadfq_jax.main --config=configs/imagenet_resnet18.py:w4a4 \
        --workdir=runs/resnet18-w4a4 --config.teacher.path=resnet18.pth

P is a file in the names of pytorchcv, torchvision or timm.

Nothing is measured until --config.eval.data_dir names a folder with a folder of images
for each class (the 50,000 validation images), or --config.eval.dataset=imagenet2012
chooses the set that TFDS prepared. The shorter side is resized to 256 pixels, and the
centre of 224 is kept.

The recipe is adadfq_imagenet_resnet18, with 80,000 steps of 16 images. Another
recipe, as in --config.recipe=best, brings its own batch, steps and rates.

The paper's figures, best-on-test: P 71.47 %; W3A3 38.10 %, W4A4 66.53 %, W5A5 70.29 %.

Argument: wKaK, with any K from 2 to 8 for kernels and activations, then options: `tpu`
trains on the same number of images in batches of 128, with the recipe
adadfq_imagenet_resnet18_tpu (`recipes.enlarge_batch`).
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK[,tpu]'."""
    weight_bits, act_bits, options = base.parse_argument(argument, "w4a4", ("tpu",))
    config = base.imagenet_config(weight_bits, act_bits)

    config.teacher.model = "resnet18"
    config.teacher.expected_top1 = 71.47

    config.recipe = "adadfq_imagenet_resnet18"
    if "tpu" in options:
        config.recipe += "_tpu"
    return config
