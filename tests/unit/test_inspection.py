"""What is said of a file of P, and whether it can be quantized."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from adadfq_jax import teacher
from adadfq_jax.config import default_config
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import inspection
from adadfq_jax.training import build
from adadfq_jax.training.spec import resolve
from tests import helpers
from tests.golden.fill import noise


def write_network(path, model, classes, channels=3):
    shapes = helpers.variable_shapes(model, classes, (32, 32, channels))
    variables = jax.tree.map(lambda leaf: abs(noise("w", leaf.shape)), shapes)
    teacher.save(path, variables, {}, model)


@pytest.mark.parametrize(
    ("model", "classes", "channels", "said"),
    [
        ("resnet20", 10, 3, ["--config=cifar10_resnet20:w4a4"]),
        ("resnet20", 100, 3, ["--config=cifar100_resnet20:w4a4"]),
        ("resnet56", 7, 3, ["teacher.model=resnet56", "num_classes=7", "enabled"]),
        ("resnet20", 10, 1, ["image_shape=(32, 32, 1)", "mean=(0.5,)"]),
        ("resnet34", 1000, 3, ["--config=imagenet_resnet18:w4a4", "model=resnet34"]),
        ("resnet50b", 1000, 3, ["--config=imagenet_resnet50:w4a4", "names decide"]),
        ("mobilenet_v2", 1000, 3, ["--config=imagenet_mobilenet_v2:w4a4"]),
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
