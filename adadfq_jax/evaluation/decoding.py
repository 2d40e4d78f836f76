"""From image files to pixels, as torchvision prepares them for ImageNet networks."""

import dataclasses
import io

import numpy as np

from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.sets import Encoded
from adadfq_jax.runtime import extras

_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoder of images with Pillow: convert, resize, crop.

    Grey and CMYK images become RGB, or all become grey for a network of one channel.
    The shorter side is resized to `resize`, the longer to int(resize * longer /
    shorter), with Pillow's antialiased filter; the middle of the network's size is
    then cropped, half pixels rounded to even (torchvision's Resize and CenterCrop on
    Pillow images).

    Attributes:
      image_shape: (H, W, channels) of the result.
      resize: the shorter side, at least H and W; 0 for images that have the size.
      resize_filter: 'bilinear' or 'bicubic'.

    Raises:
      InputError: Pillow is not installed, there are not 1 or 3 channels, or resized
        images are too small.
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
        """Pixels uint8 [H, W, channels].

        Raises:
          InputError: naming the image that cannot be read or has another size.
        """
        from PIL import Image, UnidentifiedImageError

        content = row.content
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        # Pillow's readers raise a dozen types for what they cannot read.
        try:
            with Image.open(file) as stored:
                image = stored.convert(_MODES[self.image_shape[-1]])
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            if isinstance(error, UnidentifiedImageError):
                reason = "of no known format"
            raise InputError(
                f"{row.name}: an image that cannot be read ({reason}); mend it or take"
                " it away"
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
