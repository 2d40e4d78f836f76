"""Evaluation sets in folders, DIR/<class>/*.JPEG, as torchvision reads them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.decoding import Decoding
from adadfq_jax.evaluation.sets import Encoded, StreamedSet
from adadfq_jax.runtime import invocation

# What programs and systems leave in folders, besides names that begin with a dot.
_CLUTTER = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin")
)
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
)


def stream_folder(
    folder: Path, split: str, classes_file: str, num_classes: int, decoding: Decoding
) -> StreamedSet:
    """Stream the images of class folders; a label is the index of its class.

    The images come in a shuffled order, the same every time, so that the first images
    and every slice contain all classes.

    Args:
      folder: has a folder for every class. Names that begin with a dot are ignored;
        links are followed.
      split: a name, which is ignored, and optionally a slice in TFDS's form: '[:1000]',
        'validation[50%:]'.
      classes_file: a text file with the names of the class folders in P's order, one
        on each line; '' means that their names are sorted.
      num_classes: of P.
      decoding: decodes a file to pixels.

    Raises:
      InputError: the folder, the file or the slice cannot be used.
    """
    skipped: list[str] = []
    names = _class_names(folder, classes_file, skipped)
    if len(names) != num_classes:
        what = f"{classes_file} lists" if classes_file else f"{folder} has"
        raise InputError(
            f"{what} {len(names):,} classes, the network has {num_classes:,}: each"
            " needs a folder of its images (eval.data_dir)"
        )
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in _images(folder / name, skipped)
    ]
    order_of = f"in the order of {classes_file}" if classes_file else "sorted by name"
    classes = f"classes {order_of}: {names[0]} is 0, {names[-1]} is {num_classes - 1}"
    return _stream(folder, files, split, decoding, classes, skipped)


def stream_flat(folder: Path, split: str, decoding: Decoding) -> StreamedSet:
    """Stream the images of a folder without classes; every label is 0.

    Args:
      folder: has images; those of subfolders count, too.
      split: see `stream_folder`.
      decoding: decodes a file to pixels.

    Raises:
      InputError: the folder or the slice cannot be used.
    """
    skipped: list[str] = []
    files = [(path, 0) for path in _images(folder, skipped)]
    return _stream(folder, files, split, decoding, "no classes", skipped)


def is_flat(folder: Path) -> bool:
    """Tell whether a folder has images, and no folders of classes."""
    try:
        entries = _listing(folder, [])
    except InputError:
        return False
    return not any(entry.is_dir() for entry in entries) and any(
        Path(entry.name).suffix.lower() in SUFFIXES for entry in entries
    )


def _stream(
    folder: Path,
    files: list[tuple[Path, int]],
    split: str,
    decoding: Decoding,
    classes: str,
    skipped: list[str],
) -> StreamedSet:
    order = np.random.default_rng(0).permutation(len(files))
    files = [files[i] for i in order[_slice(split, len(files))]]
    if not files:
        raise InputError(f"eval.split={split!r}: no image of {folder} is in it")

    def rows():
        return (Encoded(str(path), label, path) for path, label in files)

    others = ""
    if skipped:
        some = ", ".join(sorted(set(skipped))[:5])
        others = f"; {len(skipped):,} other files skipped ({some})"
    return StreamedSet(
        len(files),
        rows,
        decoding,
        f"{folder}: {len(files):,} images, {classes}{others}",
    )


def _class_names(folder: Path, classes_file: str, skipped: list[str]) -> list[str]:
    """Return the names of the class folders in P's order."""
    there = _listing(folder, skipped)
    found = sorted(entry.name for entry in there if entry.is_dir())
    if not found:
        raise InputError(
            f"{folder}: there are no class folders in it; eval.data_dir must"
            " have the images as <class>/<image>. Without classes,"
            f" {invocation.mode('evaluate')} says how often Q answers as P does"
        )
    skipped += [entry.name for entry in there if not entry.is_dir()]
    if not classes_file:
        _refuse_numbers(folder, found)
        return found
    try:
        lines = Path(classes_file).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{classes_file}: eval.classes must be a text file ({error})"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    wrong = [
        (twice, "is listed twice"),
        (sorted(set(names) - set(found)), f"has no folder in {folder}"),
        (sorted(set(found) - set(names)), f"is in {folder} but not listed"),
    ]
    for those, what in wrong:
        if those:
            raise InputError(f"{classes_file}: class {those[0]!r} {what}")
    return names


def _refuse_numbers(folder: Path, found: list[str]) -> None:
    # Sorted as text, 10 comes before 2, which is hardly the order of P's classes.
    if not all(name.isdecimal() for name in found):
        return
    for name, expected in zip(found, sorted(found, key=int), strict=True):
        if name != expected:
            raise InputError(
                f"{folder}: its class folders are numbers, and sorted as text {name}"
                f" comes before {expected}; eval.classes must be a file with the"
                " folders' names in P's order, one a line"
            )


def _images(folder: Path, skipped: list[str]) -> list[Path]:
    """Return the image files of a class, sorted, also those in subfolders."""
    found = []
    for entry in _listing(folder, skipped):
        path = folder / entry.name
        if entry.is_dir():
            found += _images(path, skipped)
        elif path.suffix.lower() in SUFFIXES:
            found.append(path)
        elif _is_text(path):
            skipped.append(entry.name)
        else:
            raise InputError(
                f"{path}: not an image by its name ({', '.join(sorted(SUFFIXES))});"
                " remove it from eval.data_dir"
            )
    if not found:
        raise InputError(f"{folder}: there are no images of this class")
    return sorted(found)


def _is_text(path: Path) -> bool:
    """Tell whether a file is a text, or empty."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return False
    # A character may be cut in two at the end.
    return b"\0" not in head and "\ufffd" not in head.decode(errors="replace").rstrip(
        "\ufffd"
    )


def _listing(folder: Path, skipped: list[str]) -> Sequence[os.DirEntry]:
    """Return the entries of a folder, without hidden ones and those of `_CLUTTER`.

    Args:
      folder: the folder.
      skipped: gets the names of the latter.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror}; eval.data_dir must be a folder of"
            " class folders"
        ) from error
    skipped += [entry.name for entry in visible if entry.name.lower() in _CLUTTER]
    return [entry for entry in visible if entry.name.lower() not in _CLUTTER]


def _slice(split: str, size: int) -> slice:
    """Parse the slice of 'NAME[FROM:TO]', in images or, with %, in per cent."""
    bound = r"(?:(\d+)(%?))?"
    match = re.fullmatch(rf"\w*(?:\[{bound}:{bound}\])?", split)
    if not match:
        raise InputError(
            f"eval.split={split!r}: for a folder, must be a slice such as [:1000] or"
            " [50%:], or empty"
        )

    def place(number: str | None, percent: str | None, default: int) -> int:
        if number is None:
            return default
        return round(size * int(number) / 100) if percent else int(number)

    begin, begin_percent, end, end_percent = match.groups()
    return slice(place(begin, begin_percent, 0), place(end, end_percent, size))
