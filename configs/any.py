r"""Any classifier in a file: image shape, classes and network are the file's.

    python -m adadfq_jax.main --config=configs/any.py:w4a4 --workdir=runs/any-w4a4 \
        --config.teacher.path=FILE

FILE is an ONNX file, or a PyTorch or safetensors file with the state dict of a known
network, or hf://OWNER/NAME, a repository of the Hugging Face Hub. `--mode=inspect` says
what a file is and prints this command for it. A state dict does not tell the height and
width of images: those that the network is used with most are taken, 224 for ImageNet's
and 32 for CIFAR's. No file tells the mean and std of the normalisation: those of
ImageNet are taken, 127/255 and 128/255 for TensorFlow's EfficientNet-Lite, and 0.5 and
0.25 for other than three channels. Give the true ones by config.teacher.image_shape,
mean and std. A repository tells all of these.

The recipe is `best`, a short game and a reconstruction. Nothing is measured until
--config.eval.dataset or --config.eval.data_dir names labelled images.

Argument: wKaK, with any K from 2 to 8 for kernels and activations.
"""

from adadfq_jax import config as base


def get_config(argument=None):
    """Return the configuration for 'wKaK'."""
    weight_bits, act_bits, _ = base.parse_argument(argument, "w4a4")
    config = base.default_config()
    config.recipe = "best"
    config.teacher.num_classes = 0
    config.teacher.image_shape = config.teacher.mean = config.teacher.std = ()
    config.quant.weight_bits = weight_bits
    config.quant.act_bits = act_bits
    config.eval.dataset = base.FOLDER
    return config
