"""Mutated files: read as their bytes say, or refused by name; nothing else.

    FUZZ_CASES=5000 ./launch/test.sh tests/integration/test_fuzz.py  # per kind of file

A case that takes over 10 seconds or 2 GiB, or that raises anything but InputError,
fails. Of seven kinds of file of P, 150 cases each are played by default, 200 each of
two kinds of damage to a quantized file, and 60 of an ONNX file.
"""

import argparse
import collections
import functools
import io
import json
import math
import os
import select
import struct
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adadfq_jax import teacher
from adadfq_jax.deploy.network import NetworkInfo
from tests import helpers, jobs, onnx_networks, quantized, reader, torch_files
from tests.golden.fill import noise

SECONDS = 10
CASES = int(os.environ.get("FUZZ_CASES", "150"))
CASES_OF_Q = int(os.environ.get("FUZZ_CASES", "200"))
CASES_OF_ONNX = int(os.environ.get("FUZZ_CASES", "60"))
SHAPE = (16, 16, 3)
EDGE = 16_384  # bytes at both ends, where the structure of a file is

LEGACY = (helpers.GOLDEN / "he_resnet20_legacy.th").read_bytes()
ZIP = (helpers.GOLDEN / "resnet20_cifar10_zip.pth").read_bytes()


def arrays_of(record, prefix, dtype=np.float32):
    """What a file holds, but for the counts of batches, which are not read."""
    filled = helpers.filled_state_dict(record, prefix)
    return {name: array.astype(dtype) for name, array in filled.items() if array.ndim}


HE = arrays_of("import_he_resnet20", "he_resnet20")
ZOO = arrays_of("resnet20_cifar10", "resnet20_cifar10")
HALF = arrays_of("resnet20_cifar10", "resnet20_cifar10", ml_dtypes.bfloat16)


def wrapped() -> bytes:
    """The network as a script writes it, with its average and objects beside it."""
    file = io.BytesIO()
    average = {name: array + 1 for name, array in HE.items()}
    root = {
        "args": argparse.Namespace(lr=0.1, sizes={1, 2}),
        "epoch": np.int64(3),
        "state_dict_ema": {"module": torch_files.tensors(average)},
        "model": torch_files.tensors(HE, "_orig_mod.backbone."),
        "history": collections.defaultdict(list, {"loss": [0.5] * 9}),
        "rng": np.arange(600),
        "self": torch_files.Made("script Trainer", (), {"x": 2**99}, how="NEWOBJ"),
    }
    return torch_files.save(file, root, protocol=4).getvalue()


WRAPPED = wrapped()

# A file's bytes and what it holds.
KINDS = {
    "wrapped": (WRAPPED, HE),
    "legacy": (LEGACY, HE),
    "zip": (ZIP, ZOO),
    "safetensors": (safetensors.numpy.save(ZOO), ZOO),
    "bfloat16 safetensors": (safetensors.numpy.save(HALF), HALF),
}


def expected_digests(kind: str, mutated: bytes) -> set[str]:
    """Of what the file held, and of the numbers that stand there now.

    What is put in or taken out before the numbers moves them all.
    """
    content, arrays = KINDS[kind]
    moved = len(mutated) - len(content)
    there = {}
    averages = {name: array + 1 for name, array in arrays.items()}
    for name, array in arrays.items():
        start = max(content.index(array.tobytes()) + moved, 0)
        data = mutated[start : start + array.nbytes].ljust(array.nbytes, b"\0")
        there[name] = np.frombuffer(data, array.dtype).reshape(array.shape)
    # The average is taken where the other weights have lost a name.
    found = [arrays, there, averages]
    floats = [{k: v.astype(np.float32) for k, v in each.items()} for each in found]
    return {reader.digest(teacher.from_state_dict(each)) for each in floats}


def with_pickle(content: bytes, change) -> bytes:
    """The zip file with its pickle changed, and a checksum that fits it."""
    changed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(changed, "w") as new,
    ):
        for entry in old.namelist():
            data = old.read(entry)
            is_pickle = entry.endswith("data.pkl")
            new.writestr(entry, change(data) if is_pickle else data)
    return changed.getvalue()


class Reader:
    """The process of `reader.py`, started anew after each that ended."""

    def __init__(self, folder):
        self.folder = folder
        self.process = None

    def __call__(self, content: bytes, name: str = "mutated.file") -> dict[str, str]:
        self.path = self.folder / name
        self.path.write_bytes(content)
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.reader"],
                cwd=jobs.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._ask(60)  # imports
        return self._ask(SECONDS)

    def _ask(self, seconds: float) -> dict[str, str]:
        self.process.stdin.write(f"{self.path}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            why = self.stop()
            raise AssertionError(f"no answer in {seconds} s: {why[-800:]}")
        return json.loads(line)

    def stop(self) -> str:
        """Ends the process; what it said."""
        if self.process is None:
            return ""
        self.process.kill()
        _, err = self.process.communicate()
        self.process = None
        return err


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    reader_process = Reader(tmp_path_factory.mktemp("fuzz"))
    yield reader_process
    reader_process.stop()


@st.composite
def mutations(draw, size):
    """One to three changes: (place, bytes taken out, bytes put in)."""

    def one():
        at = draw(
            st.one_of(
                st.integers(0, min(EDGE, size) - 1),
                st.integers(max(size - EDGE, 0), size - 1),
                st.integers(0, size - 1),
            )
        )
        kind = draw(st.sampled_from(["flip", "bytes", "insert", "cut", "truncate"]))
        if kind == "flip":
            return at, draw(st.integers(0, 7))
        put = draw(st.binary(min_size=1, max_size=8))
        return {
            "bytes": (at, len(put), put),
            "insert": (at, 0, put),
            "cut": (at, len(put), b""),
            "truncate": (at, size, b""),
        }[kind]

    return [one() for _ in range(draw(st.integers(1, 3)))]


def mutate(content: bytes, changes) -> bytes:
    mutated = bytearray(content)
    for change in changes:
        if len(change) == 2:
            at, bit = change
            if at < len(mutated):
                mutated[at] ^= 1 << bit
        else:
            at, taken, put = change
            mutated[at : at + taken] = put
    return bytes(mutated)


def check(read, content: bytes, expected) -> None:
    """The file is loaded as expected, or refused in a line that names it."""
    answer = read(content)
    if "refused" in answer:
        assert str(read.path) in answer["refused"]
    else:
        assert answer["loaded"] in expected()


def play(test, cases=CASES):
    """So many cases, the same ones every time."""
    return settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(test)


play_q = functools.partial(play, cases=CASES_OF_Q)


@pytest.fixture(scope="module")
def q_content(tmp_path_factory):
    """A quantized file of the tiny network."""
    info = NetworkInfo("tiny", 10, SHAPE, (0.5,) * 3, (0.2,) * 3, 4, 4, 8)
    shapes = helpers.variable_shapes("tiny", 10, SHAPE)
    variables = jax.tree.map(lambda leaf: abs(noise("w", leaf.shape)), shapes)
    path = tmp_path_factory.mktemp("q") / reader.QUANTIZED
    quantized.save(path, info, variables, noise("images", (8, *SHAPE)))
    return path.read_bytes()


def check_q(read, content: bytes, name: str = reader.QUANTIZED) -> None:
    """Loaded, finite as the process sees to, or refused in a line that names it."""
    answer = read(content, name)
    if "refused" in answer:
        assert str(read.path) in answer["refused"]
        assert "\n" not in answer["refused"] and len(answer["refused"]) < 900


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_loaded(read, kind):
    content, _ = KINDS[kind]
    assert read(content)["loaded"] in expected_digests(kind, content)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(read, kind):
    content, _ = KINDS[kind]

    @play
    @given(mutations(len(content)))
    def run(changes):
        mutated = mutate(content, changes)
        check(read, mutated, lambda: expected_digests(kind, mutated))

    run()


@pytest.mark.parametrize("kind", ["zip", "wrapped"])
def test_mutated_pickles_with_a_right_checksum(read, kind):
    @play
    @given(mutations(EDGE))
    def run(changes):
        content, _ = KINDS[kind]
        mutated = with_pickle(content, lambda pickled: mutate(pickled, changes))
        check(read, mutated, lambda: expected_digests(kind, b""))

    run()


def test_mutated_onnx_files(read):
    """Whatever a file says then is read, as long as it is a network."""
    content = onnx_networks.resnet().SerializeToString()
    assert "loaded" in read(content, reader.ONNX)

    @functools.partial(play, cases=CASES_OF_ONNX)
    @given(mutations(len(content)))
    def run(changes):
        check_q(read, mutate(content, changes), reader.ONNX)

    run()


def test_a_whole_quantized_file_is_loaded(read, q_content):
    assert "loaded" in read(q_content, reader.QUANTIZED)


def test_mutated_quantized_files(read, q_content):
    @play_q
    @given(mutations(len(q_content)))
    def run(changes):
        check_q(read, mutate(q_content, changes))

    run()


# What a header or a tensor may say instead.
NUMBERS = [0, -1, 1, 3, 4.9, 1e39, 2**70, math.inf, math.nan, True, None, "4", [], {}]
DTYPES = [np.float32, np.float16, np.float64, np.int32, np.uint8, np.bool_]


@st.composite
def declared(draw, content):
    """The file written anew with one thing that is not as it was."""
    arrays = safetensors.numpy.load(content)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])["__metadata__"]["adadfq_jax"]
    header = json.loads(header)
    kind = draw(st.sampled_from(["header", "list", "number", "dtype", "shape", "name"]))
    name = draw(st.sampled_from(sorted(arrays)))
    array, other = arrays[name].copy(), draw(st.sampled_from(NUMBERS))
    if kind == "header":
        header[draw(st.sampled_from(sorted(header)))] = other
    elif kind == "list":
        key = draw(st.sampled_from(["image_shape", "mean", "std"]))
        header[key][draw(st.integers(0, 2))] = other
    elif kind == "number":
        put = draw(st.sampled_from([-1.0, 0.5, 1e38, 3e38, np.nan, np.inf, -np.inf]))
        with np.errstate(all="ignore"):
            array.reshape(-1)[draw(st.integers(0, array.size - 1))] = (
                put if array.dtype.kind == "f" else 255
            )
        arrays[name] = array
    elif kind == "dtype":
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(draw(st.sampled_from(DTYPES)))
    elif kind == "shape":
        arrays[name] = array.reshape(draw(st.sampled_from([(-1, 1), (1, -1)])))
    else:
        arrays[draw(st.text(max_size=8))] = arrays.pop(name)
    return safetensors.numpy.save(arrays, {"adadfq_jax": json.dumps(header)})


def test_quantized_files_that_say_something_else(read, q_content):
    @play_q
    @given(declared(q_content))
    def run(content):
        check_q(read, content)

    run()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "BOOL"])
def test_quantized_files_of_other_types(read, q_content, dtype):
    """The codes, of another type of one byte."""
    length = struct.unpack("<Q", q_content[:8])[0]
    header = q_content[8 : 8 + length].rstrip().replace(b'"U8"', f'"{dtype}"'.encode())
    size = struct.pack("<Q", len(header))
    answer = read(size + header + q_content[8 + length :], reader.QUANTIZED)
    assert str(read.path) in answer["refused"] and "kernel.codes" in answer["refused"]
