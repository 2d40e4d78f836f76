"""Recordings of a run at a few of its steps, and their files.

A file `recordings/step-NNNNNN.npz` in the workdir has numpy arrays whose names are the
fields of `Snapshot` and of its parts, joined by a dot. The game does not read them.
"""

import re
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from adadfq_jax.runtime import files

FOLDER = "recordings"
BINS = 48  # of a layer's histogram
SPAN = (-0.25, 1.25)  # of a layer's histogram; its range is [0, 1]


class Answers(NamedTuple):
    """P's and Q's classes for N images, and M of the images to show.

    Attributes:
      labels: given to G, or true labels, int32 [N].
      p: P's classes, int32 [N].
      q: Q's classes, int32 [N].
      shown: indices of `images` among the N, int32 [M].
      images: uint8 [M, H, W, C].
    """

    labels: np.ndarray
    p: np.ndarray
    q: np.ndarray
    shown: np.ndarray
    images: np.ndarray


class Layers(NamedTuple):
    """Tensors before their quantization: L kernels, or L activations.

    Attributes:
      names: of the layers, [L].
      lo: lower ends of the ranges, [L]; the least over a kernel's channels.
      hi: upper ends of the ranges, [L]; the greatest over a kernel's channels.
      sqnr: ratio of signal to quantization noise in dB, [L].
      histogram: shares of the values [L, BINS] over SPAN, with lo at 0 and hi at 1;
        values outside SPAN count in the outermost bins.
    """

    names: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    sqnr: np.ndarray
    histogram: np.ndarray


class Snapshot(NamedTuple):
    """P, Q and G after `step` steps.

    Attributes:
      step: number of steps.
      p_top1: P's top-1 in per cent on the evaluation set, nan where not measured.
      q_top1: Q's top-1, likewise.
      h: H' of the generated images, [N].
      generated: answers on images of G.
      real: answers on evaluation images; None where there are none.
      kernels: of Q.
      activations: of Q, on images of G.
      real_activations: of Q, on evaluation images; None where there are none.
    """

    step: int
    p_top1: float
    q_top1: float
    h: np.ndarray
    generated: Answers
    real: Answers | None
    kernels: Layers
    activations: Layers
    real_activations: Layers | None


_PARTS: dict[str, Any] = {
    "generated": Answers,
    "real": Answers,
    "kernels": Layers,
    "activations": Layers,
    "real_activations": Layers,
}


def path_of(workdir: Path, step: int) -> Path:
    """Return the file of a step's recording."""
    return workdir / FOLDER / f"step-{step:06d}.npz"


def steps(workdir: Path) -> list[int]:
    """List the steps with a recording, in ascending order."""
    found = (
        re.fullmatch(r"step-(\d+)\.npz", path.name)
        for path in (workdir / FOLDER).glob("step-*.npz")
    )
    return sorted(int(match[1]) for match in found if match)


def drop_after(workdir: Path, step: int) -> None:
    """Remove recordings after `step`, which an interrupted game left."""
    for late in steps(workdir):
        if late > step:
            path_of(workdir, late).unlink()


def write(workdir: Path, snapshot: Snapshot) -> None:
    """Write a recording, completely or not at all."""
    arrays: dict[str, Any] = {}
    for name, value in snapshot._asdict().items():
        if name not in _PARTS:
            arrays[name] = np.asarray(value)
        elif value is not None:
            arrays.update({f"{name}.{k}": v for k, v in value._asdict().items()})

    def to_file(file: IO[bytes]) -> None:
        np.savez_compressed(file, **arrays)

    path = path_of(workdir, snapshot.step)
    path.parent.mkdir(exist_ok=True)
    files.write_stream(path, to_file)


def read(path: Path) -> Snapshot:
    """Read a recording from its file.

    Raises:
      Exception: the file is damaged; zipfile, zlib or numpy raise various types.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    parts: dict[str, Any] = {}
    for name, kind in _PARTS.items():
        there = f"{name}.{kind._fields[0]}" in arrays
        fields = (arrays[f"{name}.{field}"] for field in kind._fields if there)
        parts[name] = kind(*fields) if there else None
    return Snapshot(
        step=int(arrays["step"]),
        p_top1=float(arrays["p_top1"]),
        q_top1=float(arrays["q_top1"]),
        h=arrays["h"],
        **parts,
    )
