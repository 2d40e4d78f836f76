"""Images of a recording as markup; each image is a PNG inside the page."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from adadfq_jax.report import page
from adadfq_jax.report.drawing import Figure
from adadfq_jax.report.snapshot import Answers, Snapshot

COLUMNS = 6  # images of a class
_LARGEST = 64  # pixels of a side; larger images are subsampled


def png(pixels: np.ndarray) -> str:
    """Encode a picture uint8 [H, W, C] as a data URL."""
    from PIL import Image

    if pixels.shape[-1] not in (1, 3):
        pixels = pixels[..., :1]
    gray = pixels.shape[-1] == 1
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if gray else pixels).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _subsample(images: np.ndarray) -> np.ndarray:
    step = -(-max(images.shape[1:3]) // _LARGEST)
    return images[:, ::step, ::step]


def strip(images: np.ndarray) -> str:
    """Encode images [N, H, W, C] as the data URL of one row."""
    images = _subsample(images)
    gap = np.full((len(images), images.shape[1], 2, images.shape[3]), 128, np.uint8)
    return png(np.concatenate([*np.concatenate([images, gap], 2)], 1))


def _strips(answers: Answers, classes: Sequence[int]) -> list[tuple[Any, ...]]:
    """Return (class, images, share of the width in per cent, data URL) by class."""
    labels = answers.labels[answers.shown]
    found = {label: answers.images[labels == label][:COLUMNS] for label in classes}
    # The share makes all images one size.
    return [
        (label, len(images), 100 * len(images) / COLUMNS, strip(images))
        for label, images in found.items()
        if len(images)
    ]


def by_class(snapshots: Sequence[Snapshot], classes: Sequence[int]) -> Figure | None:
    """Show generated images by class at several steps, beside evaluation images."""
    if not snapshots:
        return None
    blocks = [(f"G, step {s.step:,}", _strips(s.generated, classes)) for s in snapshots]
    caption = (
        f"Rows are classes: {', '.join(map(str, classes))}. Images of G from the same"
        f" noise at steps {', '.join(f'{s.step:,}' for s in snapshots)}"
    )
    if (real := snapshots[-1].real) is not None:
        blocks.append(("evaluation images", _strips(real, classes)))
        caption += ", and evaluation images, which training never sees"
    body = page.part("by_class", blocks)
    return Figure("images", "Images by class", caption + ".", body, wide=True)


def disputed(name: str, title: str, answers: Answers | None) -> Figure | None:
    """Show images on which P and Q differ; None where there are none."""
    if answers is None:
        return None
    differ = answers.p != answers.q
    shown = [(i, image) for i, image in zip(answers.shown, answers.images, strict=True)]
    cells = []
    for index, image in shown:
        if differ[index]:
            label, p, q = (
                int(part[index]) for part in (answers.labels, answers.p, answers.q)
            )
            picture = png(_subsample(image[None])[0])
            cells.append((label, f"P {p}, Q {q}", picture))
    if not cells:
        return None
    caption = (
        f"P and Q differ on {int(differ.sum())} of {len(differ)} images;"
        f" {len(cells)} of them."
    )
    return Figure(name, title, caption, page.part("disputed", cells), wide=True)
