"""The evaluation set that settings name, checked against a network."""

from pathlib import Path

from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.decoding import Decoding
from adadfq_jax.evaluation.image_folder import is_flat, stream_flat, stream_folder
from adadfq_jax.evaluation.sets import AnySet, StreamedSet
from adadfq_jax.evaluation.tfds_sets import load, stream
from adadfq_jax.runtime.progress import log
from adadfq_jax.settings import FOLDER, Eval


def load_eval_set(
    chosen: Eval, image_shape: tuple[int, ...], num_classes: int
) -> AnySet:
    """Load the evaluation set that the settings name.

    Args:
      chosen: names the set and says how images are resized.
      image_shape: (H, W, channels) of the network.
      num_classes: of the network.

    Raises:
      InputError: the set cannot be read, or its images or labels do not fit.
    """
    if not chosen.measures:
        raise InputError(
            "eval.enabled=False, no eval.dataset, or a folder without eval.data_dir:"
            " there is nothing to evaluate on"
        )
    if chosen.dataset == FOLDER or chosen.resize:
        streamed = _stream(chosen, image_shape, num_classes)
        log.info(streamed.description)
        return streamed
    eval_set = load(chosen.dataset, chosen.data_dir, chosen.split)
    shape = eval_set.images.shape[1:]
    if shape != image_shape or eval_set.labels.max() >= num_classes:
        raise InputError(
            f"evaluation data {chosen.dataset!r} has images {shape} and labels to"
            f" {eval_set.labels.max()}, the network takes {image_shape} and has"
            f" {num_classes} classes; images of other sizes are resized and cropped by"
            " eval.resize"
        )
    return eval_set


def _stream(
    chosen: Eval, image_shape: tuple[int, ...], num_classes: int
) -> StreamedSet:
    """Open a folder, or a TFDS set that is resized, as a streamed set."""
    decoding = Decoding(image_shape, chosen.resize, chosen.filter)
    if chosen.dataset == FOLDER:
        folder = Path(chosen.data_dir).expanduser()
        return stream_folder(
            folder, chosen.split, chosen.classes, num_classes, decoding
        )
    return stream(chosen.dataset, chosen.data_dir, chosen.split, num_classes, decoding)


def is_unlabelled(chosen: Eval) -> bool:
    """Tell whether the settings name a folder of images without classes."""
    named = chosen.measures and chosen.dataset == FOLDER
    return named and is_flat(Path(chosen.data_dir).expanduser())


def load_unlabelled(chosen: Eval, image_shape: tuple[int, ...]) -> StreamedSet:
    """Load the images of a folder without classes, see `load_eval_set`."""
    decoding = Decoding(image_shape, chosen.resize, chosen.filter)
    folder = Path(chosen.data_dir).expanduser()
    streamed = stream_flat(folder, chosen.split, decoding)
    log.info(streamed.description)
    return streamed
