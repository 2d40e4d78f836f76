"""P's files: names and shapes are those of pytorchcv, and bad files are refused."""

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from adadfq_jax import teacher
from adadfq_jax.config import default_config
from adadfq_jax.errors import InputError
from adadfq_jax.training import build
from adadfq_jax.training.spec import resolve
from tests import helpers
from tests.golden.fill import fill

NETWORK = "resnet20_cifar10"


def state_dict(network=NETWORK):
    """As a file of the original holds it, `num_batches_tracked` included."""
    shapes = helpers.load_shapes(network)
    return {key: fill(key, tuple(shape)) for key, shape in shapes.items()}


@pytest.mark.parametrize("network", ["resnet20_cifar10", "resnet20_cifar100"])
def test_names_and_shapes_are_those_of_the_original(network):
    found = teacher.to_state_dict(helpers.filled_tree(network))
    expected = helpers.load_shapes(network)
    assert {k: list(v.shape) for k, v in found.items()} == {
        k: v for k, v in expected.items() if not k.endswith("num_batches_tracked")
    }


def test_to_and_from_are_inverse():
    wanted = state_dict()
    found = teacher.to_state_dict(teacher.from_state_dict(wanted, "resnet20"))
    for key, array in found.items():
        np.testing.assert_array_equal(array, wanted[key])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "C64"])
def test_other_types_of_numbers_are_refused_by_name(tmp_path, dtype):
    path = helpers.write_typed(tmp_path / "p.safetensors", dtype)
    with pytest.raises(InputError, match=f"weight is of type {dtype}, which") as e:
        teacher.read(path)
    assert str(path) in str(e.value)


def test_long_names_are_cut_in_messages(tmp_path):
    arrays = {**state_dict(), "x" * 100_000: np.zeros(1, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="extra") as caught:
        teacher.read(tmp_path / "p.safetensors", "resnet18")
    assert len(str(caught.value)) < 1500
    _, found = teacher.read(tmp_path / "p.safetensors")
    assert (
        "left out 1: xxx" in teacher.note_on(found)
        and len(teacher.note_on(found)) < 300
    )


def test_kernels_are_in_flax_layout():
    wanted = state_dict()
    variables = teacher.from_state_dict(wanted, "resnet20")
    kernel = variables["params"]["stage2_unit1"]["identity_conv"]["conv"]["kernel"]
    theirs = wanted["features.stage2.unit1.identity_conv.conv.weight"]
    assert theirs.shape == (32, 16, 1, 1)
    np.testing.assert_array_equal(kernel[0, 0], theirs[:, :, 0, 0].T)
    kernel = variables["params"]["init_block"]["conv"]["kernel"]
    theirs = wanted["features.init_block.conv.weight"]
    assert kernel[0, 2, 1, 5] == theirs[5, 1, 0, 2]


def test_saved_files_load_again(tmp_path):
    path, variables = tmp_path / "p.safetensors", helpers.filled_tree(NETWORK)
    teacher.save(path, variables, {"note": "made up"})
    found = teacher.load(path, "resnet20")
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"note": "made up"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_files_of_other_precision_are_read_as_float32(tmp_path, dtype):
    path = tmp_path / "half.safetensors"
    arrays = {k: v.astype(dtype) for k, v in state_dict().items()}
    safetensors.numpy.save_file(arrays, path)
    found = jax.tree.leaves(teacher.load(path, "resnet20"))
    assert {leaf.dtype for leaf in found} == {np.dtype("float32")}


STEM = "features.init_block.conv.weight"
VARIANCE = "features.stage1.unit2.body.conv1.bn.running_var"


@pytest.mark.parametrize(
    ("key", "array"),
    [
        # None: the key is missing.
        (VARIANCE, None),
        ("output.bias", None),
        (STEM, None),
        ("features.stage4.unit1.conv.weight", np.zeros(3, np.float32)),
        (VARIANCE, np.ones(15, np.float32)),
        ("output.weight", np.zeros((10, 63), np.float32)),
        ("output.weight", np.zeros(640, np.float32)),
        ("output.weight", np.zeros((10, 64), np.int32)),
        ("output.bias", np.zeros((), np.float32)),
        (STEM, np.zeros((16, 27), np.float32)),
    ],
)
def test_other_networks_are_refused_by_file_and_key(tmp_path, key, array):
    arrays, path = state_dict(), tmp_path / "p.safetensors"
    arrays.pop(key, None)
    if array is not None:
        arrays[key] = array
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(InputError) as caught:
        teacher.load(path, "resnet20")
    assert str(path) in str(caught.value) and key in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"some text\n" * 9, b"\x80\x02}q\x00."])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"p\.safetensors: (the file is empty|not a)"):
        teacher.load(path, "resnet20")


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.001])
def test_truncated_files_are_refused_by_name(tmp_path, kept):
    path = tmp_path / "p.safetensors"
    teacher.save(path, helpers.filled_tree(NETWORK), {})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=r"p\.safetensors: (the file is empty|not a)"):
        teacher.load(path, "resnet20")


@pytest.mark.parametrize(
    ("name", "said"), [("absent.safetensors", "no such file"), (".", "it is a folder")]
)
def test_missing_files_are_refused_by_name(tmp_path, name, said):
    with pytest.raises(InputError, match=said) as caught:
        teacher.load(tmp_path / name, "resnet20")
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "model"),
    [("he_resnet20_zip.pth", "resnet20a"), ("resnet20_cifar10_zip.pth", "resnet20")],
)
def test_a_configuration_without_a_network_takes_that_of_the_file(file, model, capsys):
    config = default_config()
    config.teacher.path = str(helpers.GOLDEN / file)
    loaded = build.load_teacher(resolve(config))
    assert loaded.spec.teacher.model == model
    assert f"{file}: {model} in" in loaded.note
