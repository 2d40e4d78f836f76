"""What a run records at a few of its steps, and the files it keeps it in.

`recordings/step-NNNNNN.npz` in the workdir: numpy arrays by the names of `Snapshot`,
joined by a dot. Nothing in the game reads them.
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
    """What P and Q say of N images, and M of the images, to be shown.

    labels, p, q: classes [N], int32. shown: indices [M] of the images uint8
    [M, H, W, C].
    """

    labels: np.ndarray
    p: np.ndarray
    q: np.ndarray
    shown: np.ndarray
    images: np.ndarray


class Layers(NamedTuple):
    """Tensors before their quantization: L kernels, or L activations.

    names: [L]. lo, hi: ends of the range [L]; of kernels, over their channels. sqnr:
    signal to quantization noise in dB [L]. histogram: shares of the values [L, BINS]
    over SPAN, with lo at 0 and hi at 1; beyond it in the outermost bins.
    """

    names: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    sqnr: np.ndarray
    histogram: np.ndarray


class Snapshot(NamedTuple):
    """The players after `step` steps.

    p_top1, q_top1: per cent on the evaluation set, nan where not measured then. h: H'
    of the generated images [N]. generated, real: answers on images of G, and on
    evaluation images, none of them where there are none. kernels, activations: of Q;
    real_activations: on evaluation images.
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
    """The file of a step's recording."""
    return workdir / FOLDER / f"step-{step:06d}.npz"


def steps(workdir: Path) -> list[int]:
    """Steps of which there is a recording, ascending."""
    found = (
        re.fullmatch(r"step-(\d+)\.npz", path.name)
        for path in (workdir / FOLDER).glob("step-*.npz")
    )
    return sorted(int(match[1]) for match in found if match)


def drop_after(workdir: Path, step: int) -> None:
    """Removes recordings of a game that was cut short beyond `step`."""
    for late in steps(workdir):
        if late > step:
            path_of(workdir, late).unlink()


def write(workdir: Path, snapshot: Snapshot) -> None:
    """Writes a recording, whole or not at all."""
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
    """A recording from its file.

    Raises:
      Exception: it is damaged; of what kind depends on the byte, see zipfile and zlib.
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
