"""Reading PyTorch and safetensors files, and saying what other files are."""

import zipfile
from pathlib import Path

from adadfq_jax.errors import InputError, short
from adadfq_jax.teacher import safetensors_file, torch_file
from adadfq_jax.teacher.torch_file import Contents

_HEAD = 512  # bytes in which a file shows its kind

# Beginnings of files that are no checkpoint: what the file is, and what to do.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file; run git lfs"
    " pull, or download the file itself",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes it; export the network to ONNX, or give"
    " it from Python",
    b"\x93NUMPY": "a NumPy array, not a state dict",
    b"GGUF": "a GGUF file, which holds no network of convolutions",
    b"%PDF": "a PDF document",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}


def read(path: Path) -> Contents:
    """Read what a safetensors or PyTorch file holds, by name.

    The content of the file decides its kind, not the file's name.

    Raises:
      InputError: the file does not exist, is damaged, or is of neither kind.
    """
    require_file(path)
    if not is_safetensors(path):
        other = other_kind(path)
        if other:
            raise InputError(f"{path}: not a PyTorch checkpoint, but {other}")
        return torch_file.read(path)
    try:
        arrays, _ = safetensors_file.read(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Contents(
        arrays, lambda names: {n: torch_file.as_float32(arrays[n]) for n in names}
    )


def require_file(path: Path) -> None:
    """Refuse a path that is no file, or an empty one."""
    if path.is_dir():
        raise InputError(f"{path}: it is a folder; teacher.path must name P's file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; teacher.path must name P's file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; download or copy it again")


def is_safetensors(path: Path) -> bool:
    """Tell whether a file starts like safetensors: a length, then a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def other_kind(path: Path) -> str:
    """Return what a file is that does not begin as a file of P does, or ''."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for beginning, kind in _OTHERS.items():
        if head.startswith(beginning):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if head[4:8] == b"TFL3":
        return "a LiteRT (TensorFlow Lite) file"
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "a zip archive that is cut off; download or copy it again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return "a web page or XML; download the file itself"
    if head.startswith((b"\x80", b"\x08")) or b"\0" in head:  # pickle, ONNX
        return ""
    # A character may be cut in two at the end.
    lines = head.decode(errors="replace").rstrip("\ufffd")
    shown = short(" ".join(lines.split()), 40)
    return "" if "\ufffd" in lines else f"a text that begins with {shown!r}"


def file_kind(path: Path) -> str:
    """Name the kind of a file that could be read: safetensors or a PyTorch form."""
    if is_safetensors(path):
        return "safetensors"
    return f"PyTorch checkpoint ({'zip' if zipfile.is_zipfile(path) else 'legacy'})"
