"""PyTorch files that ask for time or memory, each read in a process of its own."""

import re
import struct
import sys

import pytest

from tests import runs
from tests.bad_files import DEEP, zip_file


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


def long_number(size):
    return b"\x8b" + struct.pack("<I", size) + b"\x7f" * size


TWICE = b")q\x01" + b"0h\x01h\x01\x86q\x01" * 60


COPIED = b")" + b"2\x86" * 60


STORAGE = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n"


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("


HOSTILE = {
    "a nested tuple as a key": (b"}" + DEEP + b"Ns.", "a tuple as a key"),
    "many nested keys": (b"}(" + DEEP + b"Nu.", "a tuple as a key"),
    "a key made of itself": (b"}" + TWICE + b"Ns.", "a tuple as a key"),
    "a key made of copies": (b"}" + COPIED + b"Ns.", "DUP"),
    "a set of it": (b"\x8f(" + TWICE + b"\x90.", "EMPTY_SET"),
    "a storage of that name": (
        STORAGE + TWICE + text(b"cpu") + b"K\x06tQ.",
        "a storage of impossible name",
    ),
    "a storage of a long name": (
        STORAGE + text(b"x" * 1_000_000) + text(b"cpu") + b"K\x06tQ.",
        "a storage of impossible name",
    ),
    "a long number": (b"}" + long_number(200_000) + b"Ns.", "LONG4"),
    "many bytes": (b"}\x8a\xff" + b"\x7f" * 255 + b"Ns.", "too many bytes"),
    "many digits": (b"}I" + b"9" * 4000 + b"\nNs.", "too many digits"),
    "a shape beyond any": (
        REBUILD + STORAGE + text(b"0") + text(b"cpu") + b"K\x06tQK\x00"
        b"(\x8a\x08" + b"\xff" * 7 + b"\x7fK\x05t(K\x01K\x01ttR.",
        "impossible size",
    ),
    "a negative shape": (
        REBUILD + STORAGE + text(b"0") + text(b"cpu") + b"K\x06tQK\x00"
        b"(J\xff\xff\xff\xfft(K\x01ttR.",
        "impossible shape",
    ),
    "a long key": (b"}" + text(b"w" * 1_000_000) + b"Ns.", "no tensors"),
    "a long name": (b"c" + b"m" * 1_000_000 + b"\nx\n.", "it asks for mmm"),
    "names of the terminal": (b"}" + text(b"\x1b[2J") + b"Ns.", r"\?\[2J"),
    "attributes of a function": (
        b"ctorch\nSize\nN}" + text(b"__defaults__") + b")s\x86b.",
        "attributes of no dictionary",
    ),
    "nested all the way": (DEEP + b".", "no state dict"),
    "an object by a large number": (b"\x80\x02}r\xff\xff\xff\x7f.", "no tensors"),
}


@pytest.mark.parametrize(("pickled", "named"), HOSTILE.values(), ids=HOSTILE)
def test_pickles_that_ask_for_time_or_memory_are_refused(tmp_path, pickled, named):
    """At once, within memory, and in a short line: in a process of its own."""
    path = tmp_path / "p.pth"
    zip_file(path, pickled)
    code = (
        "import resource, sys, pathlib\n"
        "from adadfq_jax import errors\n"
        "from adadfq_jax.teacher import torch_file\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({2**30}, {2**30}))\n"
        "try: torch_file.read(pathlib.Path(sys.argv[1]))\n"
        "except errors.InputError as error: print(ascii(str(error)))"
    )
    done = runs.run([sys.executable, "-c", code, str(path)], timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    assert len(done.stdout) < 600 and str(path) in done.stdout
    assert re.search(named, done.stdout), done.stdout
