"""PyTorch files that ask for time or memory, read in a process of their own."""

import json
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


LISTS = b"]q\x01" + b"0](h\x01h\x01eq\x01" * 60


# A list of pairs, and the class of dictionaries.
PAIRS = b"](" + b"NN\x86" * 50_000 + b"eq\x010ccollections\nOrderedDict\nq\x020"


TWICE = b")q\x01" + b"0h\x01h\x01\x86q\x01" * 60


COPIED = b")" + b"2\x86" * 60


STORAGE = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n"


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("


HOSTILE = {
    "a nested tuple as a key": (b"}" + DEEP + b"Ns.", "no tensors"),
    "many nested keys": (b"}(" + DEEP + b"Nu.", "no tensors"),
    "a key made of itself": (b"}" + TWICE + b"Ns.", "no tensors"),
    "a value made of itself": (b"}" + text(b"a") + TWICE + b"s.", "too often"),
    "lists made of themselves": (b"}" + text(b"a") + LISTS + b"s.", "too often"),
    "dictionaries made of items": (
        PAIRS + b"h\x02h\x01\x85R0" * 100_000 + b"}.",
        "dictionaries made of others",
    ),
    "a list of itself": (b"]q\x01h\x01a.", "no tensors"),
    "a dictionary in itself": (b"}q\x01" + text(b"a") + b"h\x01s.", "no tensors"),
    "dictionaries nested in each other": (
        (b"}" + text(b"a")) * 100_000 + b"N" + b"s" * 100_000 + b".",
        "too often",
    ),
    "placeholders nested in each other": (
        (b"cx\ny\n)R" + text(b"a")) * 100_000 + b"N" + b"s" * 100_000 + b".",
        "too often",
    ),
    "bytes of a huge size": (b"}" + b"\x96" + b"\xff" * 8 + b"Ns.", "EOFError"),
    "a text of a huge size": (b"}\x8d" + b"\xff" * 7 + b"\x7fNs.", "checkpoint"),
    "a frame of a huge size": (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "checkpoint"),
    "a call of a function": (
        b"}" + text(b"a") + b"cos\nsystem\n" + text(b"touch x") + b"\x85Rs.",
        "an os.system",
    ),
    "a call of a call": (
        b"}" + text(b"a") + b"cbuiltins\neval\n)R)R)Rs.",
        "a builtins.eval",
    ),
    "a million placeholders": (b"]" + b"cx\ny\n)Ra" * 100_000 + b".", "no tensors"),
    "a key made of copies": (b"}" + COPIED + b"Ns.", "DUP"),
    "a set of it": (b"\x8f(" + TWICE + b"\x90.", "a set, not weights"),
    "a storage of that name": (
        STORAGE + TWICE + text(b"cpu") + b"K\x06tQ.",
        "a storage of impossible name",
    ),
    "a storage of a long name": (
        STORAGE + text(b"x" * 1_000_000) + text(b"cpu") + b"K\x06tQ.",
        "a storage of impossible name",
    ),
    "a long number": (b"}" + long_number(200_000) + b"Ns.", "no tensors"),
    "many bytes": (b"}\x8a\xff" + b"\x7f" * 255 + b"Ns.", "no tensors"),
    "many digits": (b"}I" + b"9" * 4000 + b"\nNs.", "no tensors"),
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
    "a long name": (b"c" + b"m" * 1_000_000 + b"\nx\n.", "a mmm.*, not weights"),
    "names of the terminal": (b"}" + text(b"\x1b[2J") + b"Ns.", r"\?\[2J"),
    "attributes of a function": (
        b"ctorch\nSize\nN}" + text(b"__defaults__") + b")s\x86b.",
        "a function, not weights",
    ),
    "nested all the way": (DEEP + b".", "too often"),
    "an object by a large number": (b"\x80\x02}r\xff\xff\xff\x7f.", "no tensors"),
}


READ = """
import json, pathlib, resource, sys, time
from adadfq_jax import errors, teacher
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for path in sys.argv[1:]:
    began = time.monotonic()
    try: said = "loaded " + str(teacher.read(pathlib.Path(path)))
    except errors.InputError as error: said = ascii(str(error))
    print(json.dumps([path, said, time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What is said of each file, and in how many seconds: in a process of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = {name: folder / f"{i}.pth" for i, name in enumerate(HOSTILE)}
    for name, path in paths.items():
        zip_file(path, HOSTILE[name][0])
    done = runs.run(
        [sys.executable, "-c", READ, *map(str, paths.values())], timeout=400
    )
    assert done.returncode == 0, done.stderr[-500:]
    said = {path: rest for path, *rest in map(json.loads, done.stdout.splitlines())}
    return {name: (path, *said[str(path)]) for name, path in paths.items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_that_ask_for_time_or_memory_are_refused(answers, name):
    """At once, within memory, and in a short line."""
    path, said, seconds = answers[name]
    assert len(said) < 600 and str(path) in said and "\\n" not in said
    assert re.search(HOSTILE[name][1], said), said
    assert seconds < 20
