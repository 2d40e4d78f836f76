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
    wanted = ["--mode=export", f"--workdir={finished}"]
    done = runs.main(*wanted, "--config.export.onnx=False")
    assert done.returncode == 0, done.stderr
    assert not (finished / "quantized.onnx").exists()
    (finished / "quantized.stablehlo").unlink()
    done = runs.main(*wanted)  # now both are
    assert done.returncode == 0, done.stderr
    for name in ("quantized.stablehlo", "quantized.onnx"):
        assert (finished / name).exists(), done.stdout
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


EMBEDDED = [
    ("resnet20", (4, 4)),
    ("resnet20", (3, 3)),
    ("resnet20", (8, 8)),
    ("mobilenetv2_small", (4, 4)),
]

EXPORT = """
import json, sys
from pathlib import Path

from adadfq_jax.deploy import export, verify
from adadfq_jax.settings import Export
from tests import quantized

verify.latency_ms = lambda run, images: {"1": 1, "64": 50}
images = verify.evaluation_images(quantized.fashion_mnist(1000), "fashion_mnist")
for number, (model, bits) in enumerate(json.loads(sys.argv[2])):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    file = quantized.save_fashion_mnist(folder / "q.safetensors", *bits, model=model)
    options = Export(stablehlo=bits == [4, 4])
    export.write_exports(file, folder, options, images)
"""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The folder with the exports of each of `EMBEDDED`, by number."""
    folder = tmp_path_factory.mktemp("embedded")
    # In a process that optimizes: four networks see many images several times.
    command = [sys.executable, "-c", EXPORT, folder, json.dumps(EMBEDDED)]
    done = runs.run(command, env={"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", range(len(EMBEDDED)))
def test_the_embedded_networks_on_real_images(embedded, number):
    """ONNX Runtime's top-1 is ours within 0.1 point, and StableHLO's at W4A4."""
    folder, (model, bits) = embedded / str(number), EMBEDDED[number]
    record = json.loads((folder / "export.json").read_text())
    integer = record["files"].pop("integer")
    assert integer["q_top1"] - integer["top1"] <= 0.3 + 100 / 1000
    assert not integer["worst_layer"]
    for made in record["files"].values():
        assert made["images"] == 1000
        assert abs(made["top1"] - made["q_top1"]) <= 0.1
        assert made["same_class"] >= 0.998
        assert made["bytes"] == (folder / made["file"]).stat().st_size
        if model == "resnet20":
            assert made["bytes"] < record["float32_bytes"] / (5 if bits[0] < 5 else 3)
    assert record["sha256"]
