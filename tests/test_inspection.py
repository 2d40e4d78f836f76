"""--mode=inspect: what a file is and what to type, or one line that refuses it."""

import pickle
import shlex
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from adadfq_jax import teacher
from adadfq_jax.config import default_config
from adadfq_jax.deploy import quantized_file
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import inspection
from adadfq_jax.training import build
from adadfq_jax.training.spec import resolve
from tests import helpers, runs
from tests.golden.fill import noise
from tests.test_refusals import write_malicious, write_truncated


def inspect(*arguments):
    return runs.main("--mode=inspect", *arguments)


def test_a_file_is_described_with_the_command_that_quantizes_it():
    path = helpers.GOLDEN / "he_resnet20_legacy.th"
    done = inspect(f"--config.teacher.path={path}")
    assert done.returncode == 0, done.stderr
    for line in (
        f"{path}: PyTorch checkpoint (legacy), 1,101,834 bytes",
        "network     resnet20a in He naming",
        "parameters  269,722",
        "classes     10",
        "channels    3",
        "quantize    yes:",
        "--config=configs/cifar10_resnet20.py:w4a4",
        f"--config.teacher.path={path}",
        "--config.teacher.model=resnet20a",
    ):
        assert line in done.stdout


def write_network(path, model, classes, channels=3):
    shapes = teacher.variable_shapes(model, classes, (32, 32, channels))
    variables = jax.tree.map(lambda leaf: abs(noise("w", leaf.shape)), shapes)
    teacher.save(path, variables, {}, model)


@pytest.mark.parametrize(
    ("model", "classes", "channels", "said"),
    [
        ("resnet20", 10, 3, ["cifar10_resnet20.py"]),
        ("resnet20", 100, 3, ["cifar100_resnet20.py"]),
        ("resnet56", 7, 3, ["teacher.model=resnet56", "num_classes=7", "enabled"]),
        ("resnet20", 10, 1, ["image_shape=(32, 32, 1)", "mean=(0.5,)"]),
        ("resnet34", 1000, 3, ["imagenet_resnet18.py", "model=resnet34"]),
        ("resnet50b", 1000, 3, ["imagenet_resnet50.py", "names decide"]),
        ("mobilenet_v2", 1000, 3, ["imagenet_mobilenet_v2.py"]),
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


def test_a_quantized_file_says_so_and_how_it_is_measured(finished, job):
    """What is printed can be typed, once the configuration is named."""
    path = finished / "quantized.safetensors"
    described = inspection.describe(path)
    network = quantized_file.load_quantized(path)
    leaves = jax.tree.leaves(network.variables["params"])
    assert f"parameters  {sum(leaf.size for leaf in leaves):,}\n" in described
    assert "tiny, W4A4" in described and "configs/FILE.py stands for" in described
    command = next(i for i in described.splitlines() if "--mode=evaluate" in i)
    mode, config_flag, file = shlex.split(command)[3:]
    assert config_flag == "--config=configs/FILE.py"
    done = runs.main(*job.arguments(mode, file))
    assert done.returncode == 0, done.stderr
    assert f"{path}: tiny W4A4" in done.stdout


def write_unknown(path):
    safetensors.numpy.save_file({"encoder.weight": np.zeros(3, np.float32)}, path)


FILES = {
    "a text": (lambda path: path.write_text("hello there"), "not a PyTorch"),
    "truncated": (write_truncated, "not a PyTorch checkpoint"),
    "an unknown network": (write_unknown, "unknown naming: keys as encoder.weight"),
    "malicious": (write_malicious, "mkdir, which a state dict does not need"),
    "a whole model": (
        lambda path: path.write_bytes(pickle.dumps(shutil.copy)),
        "shutil.copy, which a state dict does not need",
    ),
    "missing": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "it is a folder"),
    "of 8-bit floats": (
        lambda path: helpers.write_typed(path, "F8_E4M3"),
        "weight is of type F8_E4M3, read are",
    ),
}


@pytest.mark.parametrize(("write", "named"), FILES.values(), ids=FILES)
def test_other_files_are_refused_in_one_line(tmp_path, write, named):
    path = tmp_path / "p.pth"
    write(path)
    runs.assert_refused(inspect(f"--config.teacher.path={path}"), path, named)
    assert not (tmp_path / "executed").exists()


def test_a_file_must_be_named():
    runs.assert_refused(inspect(), "--config.teacher.path is needed")


@pytest.mark.parametrize(
    ("mode", "refused"),
    [("inspect", "missing 10"), ("export", "is to be quantized first")],
)
def test_the_mode_may_stand_behind_a_space(tmp_path, mode, refused):
    """Without --config, as with --mode=MODE: the file of P itself is refused."""
    path = shutil.copy(helpers.GOLDEN / "he_resnet20_legacy.th", tmp_path / "p.th")
    done = runs.main(
        "--mode", mode, "--file", str(path), "--config.teacher.model=resnet20"
    )
    runs.assert_refused(done, path, refused)
    assert runs.tree(tmp_path) == ["p.th"]
