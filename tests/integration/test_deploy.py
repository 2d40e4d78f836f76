"""--mode=export from the command line."""

import functools

import pytest

from tests import quantized, runs


@pytest.fixture
def save_tiny(tmp_path):
    return functools.partial(quantized.save_tiny, tmp_path)


def test_the_command_line_exports_a_file_and_a_run(job, finished, save_tiny, tmp_path):
    """A file beside it, a file into a folder that is no run's, a run's file."""
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
