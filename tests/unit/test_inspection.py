"""What is said of a file of P, and whether it can be quantized."""

import jax
import numpy as np
import onnx
import pytest
import safetensors.numpy

from adadfq_jax import teacher
from adadfq_jax.config import default_config
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import inspection
from adadfq_jax.jobs.configuration import keys_in_messages
from adadfq_jax.runtime import invocation
from adadfq_jax.training import build
from adadfq_jax.training.spec import resolve
from tests import helpers, onnx_networks
from tests.golden.fill import noise


def write_network(path, model, classes, channels=3):
    shapes = helpers.variable_shapes(model, classes, (32, 32, channels))
    variables = jax.tree.map(lambda leaf: abs(noise("w", leaf.shape)), shapes)
    teacher.save(path, variables, {}, model)


@pytest.mark.parametrize(
    ("model", "classes", "channels", "said"),
    [
        ("resnet20", 10, 3, ["image_shape=(32, 32, 3)", "mean=(0.485, 0.456, 0.406)"]),
        ("resnet56", 7, 3, ["classes     7"]),
        ("resnet20", 10, 1, ["image_shape=(28, 28, 1)", "mean=(0.5,)"]),
        ("resnet50b", 1000, 3, ["image_shape=(224, 224, 3)", "names decide"]),
    ],
)
def test_the_command_fits_the_network(tmp_path, model, classes, channels, said):
    path = tmp_path / "p.safetensors"
    write_network(path, model, classes, channels)
    described = inspection.describe(path)
    for text in (f"network     {model} in", "safetensors", *said):
        assert text in described
    assert ("config.teacher.model" in described.split("quantize")[1]) is any(
        "model=" in text for text in said
    )


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((32, 32), r"config\.teacher\.image_shape=\(32, 32\): must be"),
        ((0, 32, 3), r"config\.teacher\.image_shape=\(0, 32, 3\): must be"),
        ((28, 28, 1), r"kernel is \(3, 3, 3, 16\), but config\.teacher\.image_shape="),
    ],
)
def test_images_that_the_network_does_not_take_are_refused(tmp_path, shape, why):
    path = tmp_path / "p.safetensors"
    write_network(path, "resnet20", 10)
    with pytest.raises(InputError, match=why), keys_in_messages():
        inspection.describe(path, image_shape=shape)


def test_the_normalisation_is_that_of_the_networks_origin():
    assert build.usual_normalisation("tf_efficientnet_lite1", 3) == (
        (127 / 255,) * 3,
        (128 / 255,) * 3,
    )
    assert build.usual_normalisation("efficientnet_lite1", 3)[1][0] == 0.229
    assert build.usual_normalisation("tf_efficientnet_lite1", 1) == ((0.5,), (0.25,))


def test_the_command_has_the_form_in_which_it_was_called(tmp_path, monkeypatch):
    path = tmp_path / "p.onnx"
    onnx.save(onnx_networks.resnet(), path)
    assert "python -m adadfq_jax.main" in inspection.describe(path)
    monkeypatch.setattr(invocation, "_has_subcommands", True)
    described = inspection.describe(path)
    for text in (
        "ONNX, opset 18",
        "network     p\n",
        "images      16 x 16\n",
        "adadfq train",
        "--config=any:w4a4",
        f"--config.teacher.path={path}",
    ):
        assert text in described
    assert "teacher.image_shape" not in described


def test_an_onnx_file_without_batch_norms_names_the_key(tmp_path):
    path = tmp_path / "p.onnx"
    builder = onnx_networks.Builder()
    x = builder.node("Relu", builder.conv("x", "conv", 3, 8, bias=True))
    onnx.save(builder.model(builder.pooled(x, 8)), path)
    named = r"config\.teacher\.batch_norms=False reads"
    with pytest.raises(InputError, match=named), keys_in_messages():
        inspection.describe(path)
    described = inspection.describe(path, batch_norms=False)
    assert "--config.teacher.batch_norms=False" in described


def test_one_output_cannot_be_quantized(tmp_path):
    write_network(tmp_path / "p.safetensors", "resnet20", 1)
    described = inspection.describe(tmp_path / "p.safetensors")
    assert "classes     1" in described
    assert "quantize    no: one output has no classes to tell apart" in described
    assert "--config" not in described


def test_numbers_that_are_not_finite_cannot_be_quantized(tmp_path):
    path = tmp_path / "p.safetensors"
    write_network(path, "tiny", 10)
    arrays = safetensors.numpy.load_file(path)
    arrays["output.bias"] = np.full(10, np.inf, np.float32)
    safetensors.numpy.save_file(arrays, path)
    assert "quantize    no: ['params']['output']['bias']" in inspection.describe(
        path, "tiny"
    )


def test_variances_below_0_cannot_be_quantized(tmp_path):
    path = tmp_path / "p.safetensors"
    write_network(path, "tiny", 10)
    arrays = safetensors.numpy.load_file(path)
    (name,) = (n for n in arrays if "init_block" in n and n.endswith("running_var"))
    arrays[name][3] = -0.1
    safetensors.numpy.save_file(arrays, path)
    named = "['batch_stats']['init_block']['bn']['var'] has variances below 0"
    assert f"quantize    no: {named}" in inspection.describe(path, "tiny")
    config = default_config()
    config.teacher.update(path=str(path), model="tiny")
    with pytest.raises(InputError, match="has variances below 0") as caught:
        build.load_teacher(resolve(config))
    assert str(path) in str(caught.value)
