r"""ResNet-50 on ImageNet, with the released hyperparameters.

    python -m adadfq_jax.main --config=configs/imagenet_resnet50.py:w4a4 \
        --workdir=runs/resnet50-w4a4 --config.teacher.path=resnet50.pth

P is a file in the names of pytorchcv (the paper's, with the stride in the first 1x1
convolution) or of torchvision or timm (with the stride in the 3x3 convolution). The
form follows from the names, and the log says which it is.
--config.teacher.model=resnet50 or resnet50b overrides it.

Nothing is measured until --config.eval.data_dir names a folder with a folder of images
for each class (the 50,000 validation images), or --config.eval.dataset=imagenet2012
chooses the set that TFDS prepared. The shorter side is resized to 256 pixels, and the
centre of 224 is kept.

The recipe is adadfq_imagenet_resnet50, with 80,000 steps of 16 images. Another
recipe, as in --config.recipe=best, brings its own batch, steps and rates.

The paper's figures, best-on-test: P 77.73 %; W3A3 17.63 %, W4A4 68.38 %, W5A5 76.03 %.

Argument: wKaK, with any K from 2 to 8 for kernels and activations, then options: `tpu`
trains on the same number of images in batches of 128, with the recipe
adadfq_imagenet_resnet50_tpu (`recipes.enlarge_batch`).
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK[,tpu]'."""
    weight_bits, act_bits, options = base.parse_argument(argument, "w4a4", ("tpu",))
    config = base.imagenet_config(weight_bits, act_bits)

    config.teacher.expected_top1 = 77.73

    config.recipe = "adadfq_imagenet_resnet50"
    if "tpu" in options:
        config.recipe += "_tpu"
    return config
