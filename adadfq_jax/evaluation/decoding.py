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

    Images become RGB, or grey for a network of one channel, with 8 bits: the values of
    a 16-bit image are divided by 257, and those of a floating-point image, which must
    lie in [0, 1], are multiplied by 255. The shorter side is resized to `resize`, the
    longer to int(resize * longer / shorter), with Pillow's antialiased filter. Then the
    centre is cropped to the network's size, with half pixels rounded to even. This is
    torchvision's Resize and CenterCrop on Pillow images.

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
                image = _eight_bits(stored).convert(_MODES[self.image_shape[-1]])
        except InputError as error:
            raise InputError(f"{row.name}: {error}") from error
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


def _eight_bits(image):
    """Return a Pillow image with 8 bits a value; Pillow's own conversion would clip.

    Raises:
      InputError: the values have no known range.
    """
    from PIL import Image

    # Files of these kinds have 16 bits where Pillow says 32.
    is_16 = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000")
    )
    if image.mode not in ("I", "F") and not is_16:
        return image
    values = np.asarray(image, np.float64)
    if is_16:
        values = values / 257
    elif image.mode == "F" and np.all((values >= 0) & (values <= 1)):
        values = values * 255
    else:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise InputError(
            f"its pixels are {kind} numbers from {values.min():g} to {values.max():g},"
            " whose range is not known; save the image with 8 or 16 bits"
        )
    return Image.fromarray(np.round(np.clip(values, 0, 255)).astype(np.uint8))
