"""Names of packaged configurations, what an extra brings, the form of commands."""

import shutil
import sys

import pytest

from adadfq_jax import config
from adadfq_jax.deploy import export
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import command_line, exports
from adadfq_jax.runtime import extras, invocation
from adadfq_jax.runtime.versions import __version__, versions
from adadfq_jax.settings import Export
from adadfq_jax.training.spec import resolve
from tests import quantized
from tests.configurations import CONFIGS


def test_every_configuration_has_its_name():
    assert config.names() == [path.stem for path in CONFIGS]
    for path in CONFIGS:
        assert config.locate(path.stem) == str(path)
        assert config.locate(f"{path.stem}:w3a3,paper") == f"{path}:w3a3,paper"


@pytest.mark.parametrize(
    "text", ["configs/x.py:w4a4", "x.py", "/x/cifar10_resnet20", "./cifar10_resnet20"]
)
def test_a_path_stays_as_it_is(text):
    assert config.locate(text) == text


def test_a_file_of_any_name_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIGS[0], tmp_path / "mine")
    assert config.locate("mine:w4a4") == "mine:w4a4"


@pytest.mark.parametrize("text", ["resnet20", "cifar10:w4a4", "tests", ""])
def test_an_unknown_name_is_refused_with_those_that_there_are(text):
    with pytest.raises(InputError, match=r"cifar10_resnet20, .*imagenet_resnet50$"):
        config.locate(text)


def test_a_configuration_is_executed_by_its_name():
    made = command_line.config_file("cifar10_resnet20").get_config("w3a3")
    assert made.quant.weight_bits == 3
    assert config.load("cifar10_resnet20", "w3a3") == made
    with pytest.raises(InputError, match=r"'any.py' is not a configuration of"):
        config.load("any.py")


def test_commands_have_the_form_in_which_the_program_was_called(monkeypatch):
    argv = ["path/to/it", "--workdir=a b"]
    assert invocation.mode("inspect") == "--mode=inspect"
    module = "python -m adadfq_jax.main"
    assert invocation.command("train", "--x=a b") == [module, "'--x=a b'"]
    assert invocation.command("export") == [f"{module} --mode=export"]
    assert invocation.repeated(argv) == f"{module} '--workdir=a b'"

    monkeypatch.setattr(invocation, "_has_subcommands", True)
    assert invocation.mode("inspect") == "adadfq inspect"
    assert invocation.command("train", "--x=a b") == ["adadfq train", "'--x=a b'"]
    assert invocation.repeated(["it", "train", "--x"]) == "adadfq train --x"


def test_what_is_installed_is_told_without_importing_it(monkeypatch):
    assert extras.are_installed("json", "this") and "this" not in sys.modules
    assert not extras.are_installed("json", "no_such_package")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert not extras.are_installed("onnx", "onnxruntime")


def test_versions_of_what_is_not_installed_are_left_out():
    found = versions(["numpy", "no-such-package"])
    assert found["adadfq_jax"] == __version__ and set(found) == {
        "adadfq_jax",
        "python",
        "numpy",
    }


def test_without_onnx_its_file_is_left_out_or_refused(tmp_path, monkeypatch):
    file = quantized.save_tiny(tmp_path, 4)
    spec = resolve({"eval": {"enabled": False}, "recipe": "adadfq"})
    whole = exports.export_files(spec, file, tmp_path)
    assert set(whole["files"]) == {"onnx", "integer", "stablehlo"}
    assert not exports.notes(spec)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (note,) = exports.notes(spec)
    assert note.startswith("WARNING: quantized.onnx will be left out: ")
    there = exports.export_files(spec, file, tmp_path)
    assert there["files"]["onnx"]["sha256"] == whole["files"]["onnx"]["sha256"]

    export.remove_exports(tmp_path)
    with pytest.raises(InputError, match=r"pip install 'adadfq_jax\[onnx\]', or conf"):
        exports.export_files(spec, file, tmp_path, all_or_none=True)
    with pytest.raises(InputError, match=r"pip install 'adadfq_jax\[onnx\]'"):
        export.write_exports(file, tmp_path, Export())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    left = exports.export_files(spec, file, tmp_path)
    assert set(left["files"]) == {"stablehlo"}
    again = exports.export_files(spec, file, tmp_path)
    assert again["float32_latency_ms"] == left["float32_latency_ms"]  # not made anew
