"""Decoding of image files to pixels, as torchvision does it for ImageNet networks."""

import dataclasses
import io

import numpy as np

from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.sets import Encoded
from adadfq_jax.runtime import extras

_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A decoder that converts, resizes and crops images with Pillow.

    Images become RGB, or grey for a network of one channel. The shorter side is resized
    to `resize`, the longer to int(resize * longer / shorter), with Pillow's antialiased
    filter. Then the centre is cropped to the network's size, with half pixels rounded
    to even. This is torchvision's Resize and CenterCrop on Pillow images.

    Attributes:
      image_shape: (H, W, channels) of the result.
      resize: length of the shorter side, at least H and W; 0 means no resizing, for
        images that already have the right size.
      resize_filter: 'bilinear' or 'bicubic'.

    Raises:
      InputError: Pillow is not installed, the number of channels is not 1 or 3, or
        `resize` is too small.
    """

    image_shape: tuple[int, ...]
    resize: int = 0
    resize_filter: str = "bilinear"

    def __post_init__(self):
        if self.image_shape[-1] not in _MODES:
            raise InputError(
                f"teacher.image_shape={self.image_shape}: image files give 1 or"
                " 3 channels"
            )
        if 0 < self.resize < max(self.image_shape[:2]):
            raise InputError(
                f"eval.resize={self.resize}: the network takes images of"
                f" {self.image_shape}"
            )
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise extras.missing(
                "evaluation on image files", "pillow", "eval", "or eval.enabled=False"
            ) from error

    def __call__(self, row: Encoded) -> np.ndarray:
        """Decode an image to pixels, uint8 [H, W, channels].

        Raises:
          InputError: the image, which is named, cannot be read or has another size.
        """
        from PIL import Image, UnidentifiedImageError

        content = row.content
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        # Pillow's readers raise a dozen types of errors.
        try:
            with Image.open(file) as stored:
                image = stored.convert(_MODES[self.image_shape[-1]])
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            if isinstance(error, UnidentifiedImageError):
                reason = "of no known format"
            raise InputError(
                f"{row.name}: an image that cannot be read ({reason}); repair or"
                " remove it"
            ) from error
        height, width = self.image_shape[:2]
        if self.resize:
            image = self._resized(image)
        elif (image.height, image.width) != (height, width):
            raise InputError(
                f"{row.name}: it is {image.height} x {image.width} pixels, the network"
                f" takes {height} x {width}: set eval.resize to the shorter"
                " side before the crop (256 for most ImageNet networks)"
            )
        top = round((image.height - height) / 2)
        left = round((image.width - width) / 2)
        image = image.crop((left, top, left + width, top + height))
        return np.asarray(image, np.uint8).reshape(self.image_shape)

    def _resized(self, image):
        from PIL import Image

        shorter = min(image.size)
        size = tuple(
            self.resize if side == shorter else int(self.resize * side / shorter)
            for side in image.size
        )
        return image.resize(size, Image.Resampling[self.resize_filter.upper()])
