"""Images of a recording as markup; each image is a PNG inside the page."""

import base64
import io
from collections.abc import Sequence

import numpy as np

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


def _block(heading: str, answers: Answers, classes: Sequence[int]) -> str:
    """Render a table with a strip of images for each class."""
    labels = answers.labels[answers.shown]
    rows = []
    for label in classes:
        found = answers.images[labels == label][:COLUMNS]
        if len(found):
            share = 100 * len(found) / COLUMNS  # so that all images have one size
            rows.append(
                f'<tr><th scope="row">{label}</th><td><img class="pixels"'
                f' style="width: {share:.4g}%" src="{strip(found)}"'
                f' alt="{len(found)} images'
                f' of class {label}, {heading}"></td></tr>'
            )
    return (
        f'<table class="strips"><caption>{heading}</caption>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def by_class(snapshots: Sequence[Snapshot], classes: Sequence[int]) -> Figure | None:
    """Show generated images by class at several steps, beside evaluation images."""
    if not snapshots:
        return None
    blocks = [_block(f"G, step {s.step:,}", s.generated, classes) for s in snapshots]
    caption = (
        f"Rows are classes: {', '.join(map(str, classes))}. Images of G from the same"
        f" noise at steps {', '.join(f'{s.step:,}' for s in snapshots)}"
    )
    if (real := snapshots[-1].real) is not None:
        blocks.append(_block("evaluation images", real, classes))
        caption += ", and evaluation images, which training never sees"
    body = f'<div class="blocks">{"".join(blocks)}</div>'
    return Figure("images", "Images by class", caption + ".", body)


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
            told = f"P {p}, Q {q}"
            cells.append(
                f'<li><img class="pixels" src="{png(_subsample(image[None])[0])}"'
                f' alt="label {label}, {told}">'
                f"<span>label {label}<br>{told}</span></li>"
            )
    if not cells:
        return None
    caption = (
        f"P and Q differ on {int(differ.sum())} of {len(differ)} images;"
        f" {len(cells)} of them."
    )
    return Figure(name, title, caption, f'<ul class="disputed">{"".join(cells)}</ul>')
