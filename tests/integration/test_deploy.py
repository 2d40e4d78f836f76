"""--mode=export from the command line."""

import functools
import json
import shutil
import sys

import pytest

from tests import quantized, runs


@pytest.fixture
def save_tiny(tmp_path):
    return functools.partial(quantized.save_tiny, tmp_path)


def test_the_command_line_exports_a_file_and_a_run(job, finished, save_tiny, tmp_path):
    """A file beside it, a file into a folder that is no run's, a run's file."""
    finished = shutil.copytree(finished, tmp_path / "finished")
    done = runs.main("--mode=export", f"--file={save_tiny(4)}")
    assert done.returncode == 0, done.stderr
    assert "quantized.onnx" in done.stdout and "random images" in done.stdout
    text = (tmp_path / "model_card.md").read_text()
    assert "tiny W4A4" in text and "exported without its run" in text
    (tmp_path / "new").mkdir()
    file = tmp_path / "quantized.safetensors"
    done = runs.main("--mode=export", f"--file={file}", f"--workdir={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "quantized.onnx").exists()

    text = (finished / "model_card.md").read_text()  # without files, both switched off
    assert "# tiny W4A4" in text and "p.safetensors" in text and "| file |" not in text
    done = runs.main("--mode=export", f"--workdir={finished}")  # now they are wanted
    assert done.returncode == 0, done.stderr
    assert (finished / "quantized.stablehlo").exists(), done.stdout
    arguments = job.arguments(
        "--config.export.onnx=True",
        "--config.export.layout=NCHW",
        "--config.export.pixels=True",
    )
    done = runs.main("--mode=export", f"--workdir={finished}", *arguments)
    assert done.returncode == 0, done.stderr
    assert "takes uint8 pixels NCHW" in done.stdout and "64 of small_set" in done.stdout
    text = (finished / "model_card.md").read_text()
    assert "p.safetensors" in text and "--config.game.steps=20" in text
    assert "none" in text and "quantized.onnx" in text

    (tmp_path / "text").write_text("hello")
    refused = runs.main("--mode=export", f"--file={tmp_path / 'text'}")
    runs.assert_refused(refused, tmp_path / "text")
    runs.assert_refused(runs.main("--mode=export"), "--file is needed")


EXPORT = """
import sys
from pathlib import Path

from adadfq_jax.deploy import export, verify
from tests import quantized

folder, model, *bits = sys.argv[1:]
file = Path(folder) / "q.safetensors"
quantized.save_fashion_mnist(file, *map(int, bits), model=model)
verify.LATENCY_BATCHES.update({1: 2, 64: 1})
images = verify.evaluation_images(quantized.fashion_mnist(1000), "fashion_mnist")
export.write_exports(file, file.parent, export.Options(), images)
"""


@pytest.mark.parametrize(
    ("model", "bits"),
    [
        ("resnet20", (4, 4)),
        ("resnet20", (3, 3)),
        ("resnet20", (8, 8)),
        ("mobilenetv2_small", (4, 4)),
    ],
)
def test_the_embedded_networks_on_real_images(tmp_path, model, bits):
    """ONNX Runtime's top-1 is within 0.1 point of ours, and StableHLO's."""
    # In a process that optimizes: four networks see many images several times.
    command = [sys.executable, "-c", EXPORT, tmp_path, model, *bits]
    done = runs.run(command, env={"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "export.json").read_text())
    integer = record["files"].pop("integer")
    assert integer["q_top1"] - integer["top1"] <= 0.3 + 100 / 1000
    assert integer["latency_ms"] and not integer["worst_layer"]
    for made in record["files"].values():
        assert made["images"] == 1000
        assert abs(made["top1"] - made["q_top1"]) <= 0.1
        assert made["same_class"] >= 0.998
        assert made["bytes"] == (tmp_path / made["file"]).stat().st_size
        if model == "resnet20":
            assert made["bytes"] < record["float32_bytes"] / (5 if bits[0] < 5 else 3)
    assert record["sha256"]
