"""--mode=inspect: what a file is and what to type, or one line that refuses it."""

import pickle
import shlex
import shutil

import numpy as np
import pytest
import safetensors.numpy

from adadfq_jax.deploy import quantized_file
from adadfq_jax.jobs import inspection
from tests import helpers, jobs, runs
from tests.bad_files import write_malicious, write_truncated


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
        "measured    with --config.eval.data_dir=FOLDER (images in a folder per class)",
        "quantize    yes:",
        "--config=configs/any.py:w4a4",
        f"--config.teacher.path={path}",
        "--config.teacher.image_shape=(32, 32, 3)",
    ):
        assert line in done.stdout


def test_a_quantized_file_says_so_and_how_it_is_measured(finished, job):
    """What is printed can be typed, once the configuration is named."""
    path = finished / "quantized.safetensors"
    described = inspection.describe(path)
    network = quantized_file.load_quantized(path)
    assert len(network.graph.parameters) == 8  # kernels, a bias, two batch norms
    assert "parameters  1,586\n" in described
    assert "tiny, W4A4" in described and "NAME stands for" in described
    command = next(i for i in described.splitlines() if "--mode=evaluate" in i)
    mode, config_flag, file = shlex.split(command)[3:]
    assert config_flag == "--config=NAME"
    done = runs.main(*job.arguments(mode, file))
    assert done.returncode == 0, done.stderr
    assert f"{path}: tiny W4A4" in done.stdout


def write_unknown(path):
    safetensors.numpy.save_file({"encoder.weight": np.zeros(3, np.float32)}, path)


FILES = {
    "a text": (lambda path: path.write_text("hello there"), "not a PyTorch"),
    "truncated": (write_truncated, "not a PyTorch checkpoint"),
    "an unknown network": (write_unknown, "unknown naming: keys as encoder.weight"),
    "malicious": (write_malicious, "no tensors in it; it holds weight (a posix.mkdir)"),
    "a whole model": (
        lambda path: path.write_bytes(pickle.dumps(shutil.copy)),
        "but a pickle of a shutil.copy",
    ),
    "missing": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "it is a folder"),
    "of 8-bit floats": (
        lambda path: helpers.write_typed(path, "F8_E4M3"),
        "weight is of type F8_E4M3, which cannot be read",
    ),
}


@pytest.mark.parametrize(("write", "named"), FILES.values(), ids=FILES)
def test_other_files_are_refused_in_one_line(tmp_path, write, named):
    path = tmp_path / "p.pth"
    write(path)
    runs.assert_refused(inspect(f"--config.teacher.path={path}"), path, named)
    assert not (tmp_path / "executed").exists()


def test_a_file_must_be_named():
    runs.assert_refused(inspect(), "--file is needed")


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
    assert jobs.tree(tmp_path) == ["p.th"]
