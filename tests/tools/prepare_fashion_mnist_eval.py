"""Writes the embedded evaluation set: the 10,000 test images of Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    PYTHONPATH=. .venv/bin/python tests/tools/prepare_fashion_mnist_eval.py

A prepared TFDS data set `fashion_mnist/3.0.1` with the split `test` alone, in the
original order, in array_record, which TFDS reads without TensorFlow.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from train_fashion_mnist_teacher import load_split

LICENSE = (
    "MIT License, Copyright (c) 2017 Zalando SE;"
    " the text is in NOTICE.md two folders up"
)


def as_png(image: np.ndarray) -> io.BytesIO:
    """A PNG file of a uint8 image [H, W]; TFDS encodes arrays with TensorFlow only."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    file.seek(0)
    return file


class FashionMnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The stock data set's name, version and features, from local idx files."""

    name = "fashion_mnist"
    VERSION = tfds.core.Version("3.0.1")

    def __init__(self, *, source: Path, **kwargs):
        self._source = source
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Test images of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017).",
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            license=LICENSE,
            features=features,
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        images, labels = load_split(self._source, "t10k")
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": as_png(image[..., 0]), "label": int(label)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default="/usr/share/datasets/fashion-mnist"
    )
    parser.add_argument("--output", type=Path, default="adadfq_jax/assets")
    args = parser.parse_args()
    builder = FashionMnist(
        source=args.data, data_dir=args.output, file_format="array_record"
    )
    with tempfile.TemporaryDirectory() as downloads:  # there are none
        builder.download_and_prepare(download_dir=downloads)
    print(f"{builder.data_path}: {builder.info.splits['test'].num_examples} images")


if __name__ == "__main__":
    main()
