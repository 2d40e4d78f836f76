"""Small TFDS classification sets, written as array_record."""

import io
import tempfile

import tensorflow_datasets as tfds
from PIL import Image

NAME = "small_set"


def _png(image):
    """A PNG file; TFDS encodes arrays with TensorFlow only."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    file.seek(0)
    return file


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("3.0.2")

    def __init__(self, *, images, labels, classes, **kwargs):
        self._arrays, self._classes = (images, labels), classes
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=self._shape()),
                "label": tfds.features.ClassLabel(num_classes=self._classes),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )

    def _shape(self):
        """Of the images; height and width are open where they differ."""
        shapes = {image.shape for image in self._arrays[0]}
        return shapes.pop() if len(shapes) == 1 else (None, None, 3)

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        for i, (image, label) in enumerate(zip(*self._arrays, strict=True)):
            yield i, {"image": _png(image), "label": int(label)}


def write(folder, images, labels, classes, name=NAME):
    """Prepares uint8 images [H, W, C] as the split 'test' of a set `name`."""
    builder = type(name, (_Builder,), {"name": name}, skip_registration=True)(
        images=images,
        labels=labels,
        classes=classes,
        data_dir=folder,
        file_format="array_record",
    )
    with tempfile.TemporaryDirectory() as downloads:  # there are none
        builder.download_and_prepare(download_dir=downloads)
