"""PyTorch files without PyTorch: real ones read exactly, others refused."""

import collections
import io
import pickle
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest

from adadfq_jax import teacher
from adadfq_jax.errors import InputError
from adadfq_jax.teacher import search, torch_file
from tests import helpers
from tests.bad_files import DEEP, Runs, zip_file
from tests.golden.fill import fill

ZIP = helpers.GOLDEN / "resnet20_cifar10_zip.pth"
LEGACY = helpers.GOLDEN / "he_resnet20_legacy.th"


def arrays_of(path):
    """All tensors of a file."""
    contents = torch_file.read(path)
    return contents.arrays(
        [name for name, entry in contents.entries.items() if search.is_tensor(entry)]
    )


@pytest.mark.parametrize(
    ("path", "prefix", "count"),
    [
        (ZIP, "resnet20_cifar10", 128),
        (LEGACY, "he_resnet20", 116),
        (helpers.GOLDEN / "he_resnet20_zip.pth", "he_resnet20", 116),
    ],
)
def test_real_files_are_read_exactly(path, prefix, count):
    arrays = arrays_of(path)
    assert len(arrays) == count
    for name, array in arrays.items():
        key = name.removeprefix("state_dict.").removeprefix("module.")
        np.testing.assert_array_equal(array, fill(f"{prefix}.{key}", array.shape))


def test_a_pytorchcv_file_is_a_teacher():
    ours = teacher.load(ZIP, "resnet20")
    theirs = helpers.filled_tree("resnet20_cifar10")
    np.testing.assert_array_equal(
        ours["params"]["output"]["kernel"], theirs["params"]["output"]["kernel"]
    )


def test_another_network_is_refused_with_its_keys():
    with pytest.raises(InputError) as caught:
        teacher.load(LEGACY, "resnet20")
    message = str(caught.value)
    assert str(LEGACY) in message
    assert "missing 10: layer2.0.shortcut.0.weight" in message
    assert "extra 0: none" in message and "teacher.model=resnet20a" in message


def test_nothing_in_a_file_is_executed(tmp_path):
    path, target = tmp_path / "p.pth", tmp_path / "made"
    zip_file(path, pickle.dumps({"weight": Runs(target)}))
    assert torch_file.read(path).entries == {"weight": "a posix.mkdir"}
    path.write_bytes(pickle.dumps(Runs(target)))
    with pytest.raises(InputError, match=r"p\.pth.*mkdir"):
        torch_file.read(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "os system", "torch.hub load", "numpy.core.multiarray x"]
)
def test_names_that_no_tensor_needs_are_not_looked_up(tmp_path, name):
    module, attribute = name.split()
    path = tmp_path / "p.pth"
    zip_file(path, f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(InputError, match=f"an? {module}.{attribute}, not weights"):
        torch_file.read(path)


class _Global:
    """Pickles as a reference to a name, which need not be importable here."""

    def __init__(self, name):
        self.name = name


class _Pickler(pickle._Pickler):
    """Writes state dicts as PyTorch does, without PyTorch."""

    def persistent_id(self, item):
        return item[1:] if isinstance(item, tuple) and item[:1] == ("pid",) else None

    def save_global_name(self, item):
        self.write(b"c" + item.name.replace(" ", "\n").encode() + b"\n")

    dispatch: ClassVar = {**pickle._Pickler.dispatch, _Global: save_global_name}


class _Call:
    def __init__(self, *arguments):
        self.arguments = arguments


def _save_call(pickler, call):
    pickler.save(_Global("torch._utils _rebuild_tensor_v2"))
    pickler.save(call.arguments)
    pickler.write(pickle.REDUCE)


_Pickler.dispatch[_Call] = _save_call


def state_dict_file(
    path,
    *,
    size=6,
    offset=0,
    shape=(2, 3),
    strides=(3, 1),
    data=None,
    kind="Float",
    others=None,
    beside=None,
    wrapper="",
    protocol=2,
):
    """A zip state dict of one tensor `weight`, with the given declarations.

    beside: other entries. wrapper: the key of the dictionary of the tensor, if any.
    """
    storage = ("pid", "storage", _Global(f"torch {kind}Storage"), "0", "cuda:0", size)
    tensor = _Call(storage, offset, shape, strides, False, collections.OrderedDict())
    file = io.BytesIO()
    weights = {"weight": tensor}
    root = {wrapper: weights} if wrapper else weights
    _Pickler(file, protocol).dump({**root, **(beside or {})})
    content = np.arange(6, dtype=np.float32).tobytes() if data is None else data
    zip_file(path, file.getvalue(), {"0": content, **(others or {})})
    return path


def test_tensors_are_views_of_their_storage(tmp_path):
    whole = arrays_of(state_dict_file(tmp_path / "a"))["weight"]
    np.testing.assert_array_equal(whole, [[0, 1, 2], [3, 4, 5]])
    turned = state_dict_file(tmp_path / "b", shape=(3, 2), strides=(1, 3))
    read = arrays_of(turned)["weight"]
    np.testing.assert_array_equal(read, [[0, 3], [1, 4], [2, 5]])
    part = state_dict_file(tmp_path / "c", shape=(1, 2), strides=(9, 1), offset=4)
    np.testing.assert_array_equal(arrays_of(part)["weight"], [[4, 5]])


@pytest.mark.parametrize(
    ("kind", "dtype", "read_as"),
    [
        ("Half", np.float16, np.float16),
        ("BFloat16", ml_dtypes.bfloat16, np.float32),
        ("Double", np.float64, np.float64),
        ("Long", np.int64, np.int64),
    ],
)
def test_other_types_of_numbers_are_read_exactly(tmp_path, kind, dtype, read_as):
    data = np.array([[-1.5, 2, 3], [1, 0, 0.25]]).astype(dtype)
    path = state_dict_file(tmp_path / "p.pth", kind=kind, data=data.tobytes())
    found = arrays_of(path)["weight"]
    assert found.dtype == read_as
    np.testing.assert_array_equal(found, data.astype(read_as))


def test_keys_of_legacy_storages_are_text(tmp_path):
    """They are looked up, which would hash a million nested tuples."""
    numbers = pickle.dumps(torch_file.LEGACY_MAGIC, 2), pickle.dumps(1001, 2)
    start = b"".join((*numbers, pickle.dumps({"little_endian": True}, 2), b"}."))
    path = tmp_path / "p.th"
    path.write_bytes(start + b"](" + DEEP + b"eN\x86." + bytes(8))
    with pytest.raises(InputError, match="a storage of impossible name"):
        arrays_of(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_stands_beside_the_weights(tmp_path, protocol):
    """Settings and counts are passed over, at every protocol that PyTorch is given."""
    beside = {
        "epoch": 3,
        "seed": 2**60,
        "lr": 0.1,
        "names": ["a", None, True],
        "optimizer": {"state": {0: {"step": 1}}, "shape": (1, 2, 3, 4)},
    }
    path = tmp_path / "p.pth"
    state_dict_file(path, beside=beside, protocol=protocol)
    assert list(arrays_of(path)) == ["weight"]


def test_tensors_that_share_their_numbers_too_often_are_refused(tmp_path):
    storage = ("pid", "storage", _Global("torch FloatStorage"), "0", "cpu", 600)
    tensor = _Call(storage, 0, (600,), (1,), False, collections.OrderedDict())
    file = io.BytesIO()
    _Pickler(file, 2).dump({f"w{i}": tensor for i in range(1000)})
    zip_file(tmp_path / "p.pth", file.getvalue(), {"0": bytes(2400)})
    with pytest.raises(InputError, match="tensors of 600000 numbers"):
        arrays_of(tmp_path / "p.pth")


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (3, 3)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (4, 1)},
        {"strides": (2, 1)},
        {"shape": (2, 2), "strides": (3, 1)},
        {"strides": (-3, 1)},
        {"shape": (2, 10**12), "strides": (0, 0)},
        {"shape": (2,)},
        {"size": 10**15},
        {"size": -6},
        {"data": b""},
        {"others": {"1": b""}},
        {"data": bytes(23)},
    ],
)
def test_declarations_beyond_the_data_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match=r"p\.pth"):
        arrays_of(state_dict_file(tmp_path / "p.pth", **wrong))


@pytest.mark.parametrize("path", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01, 0.0001])
def test_truncated_files_are_refused(tmp_path, path, kept):
    content = path.read_bytes()
    damaged = tmp_path / "p.pth"
    damaged.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=r"p\.pth"):
        arrays_of(damaged)


def test_flipped_bytes_load_equal_in_shape_or_are_refused(tmp_path):
    """Damage in the pickle must not surface as anything but InputError."""
    content = LEGACY.read_bytes()
    rng = np.random.default_rng(0)
    damaged = tmp_path / "p.th"
    refused = 0
    for _ in range(300):
        mutated = bytearray(content)
        mutated[rng.integers(0, 8000)] ^= 1 << int(rng.integers(0, 8))
        damaged.write_bytes(mutated)
        try:
            arrays = arrays_of(damaged)
        except InputError as error:
            refused += 1
            assert str(damaged) in str(error)
        else:
            assert all(isinstance(a, np.ndarray) for a in arrays.values())
    assert refused > 30
