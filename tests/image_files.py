"""Folders of real image files, and Pillow's own preparation of them."""

import numpy as np
from PIL import Image


def picture(rng, height, width):
    """Smooth random pixels uint8 [H, W, 3], which JPEG keeps well."""
    coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def write(folder, names, each, seed=0):
    """JPEGs of many sizes, `each` of every class; one is grey, one CMYK."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            height, width = rng.integers(24, 60, 2)
            image = Image.fromarray(picture(rng, height, width))
            if i == 0:
                image = image.convert("L" if name == names[0] else "CMYK")
            image.save(folder / name / f"{name}_{i}.JPEG", quality=90)


def prepare(path, resize, size, resampling=Image.Resampling.BILINEAR):
    """Pixels as torchvision's Resize(resize) and CenterCrop(size) leave them."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if width <= height:
        shape = (resize, int(resize * height / width))
    else:
        shape = (int(resize * width / height), resize)
    image = np.asarray(image.resize(shape, resampling))
    top = round((image.shape[0] - size) / 2.0)
    left = round((image.shape[1] - size) / 2.0)
    return image[top : top + size, left : left + size]
