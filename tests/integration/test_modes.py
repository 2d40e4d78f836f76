"""--mode=evaluate and --mode=sample on a finished run."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests import jobs, runs


def top1_lines(done):
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "top-1" in line]


def test_evaluate_measures_p_and_q_of_a_run(job, finished):
    summary = json.loads((finished / "summary.json").read_text())
    for arguments in (["--mode=evaluate"], ["--mode=evaluate", *job.arguments()]):
        p, q = top1_lines(runs.main(*arguments, f"--workdir={finished}"))
        assert p.startswith(f"{job.p_file}: tiny in full precision, small_set test, 64")
        assert p.endswith(f"top-1 {summary['p_top1']:.2f} %")
        assert q.startswith(f"{finished}/quantized.safetensors: tiny W4A4, small_set")
        assert q.endswith(f"top-1 {summary['q_last_top1']:.2f} %")


@pytest.mark.parametrize("quantized", [True, False])
def test_evaluate_tells_a_file_by_its_content(job, finished, tmp_path, quantized):
    source = finished / "quantized.safetensors" if quantized else job.p_file
    shutil.copy(source, tmp_path / "file")
    arguments = job.arguments("--mode=evaluate", f"--file={tmp_path / 'file'}")
    (line,) = top1_lines(runs.main(*arguments))
    assert ("W4A4" in line) is quantized


def test_evaluate_refuses_what_it_cannot_measure(job, finished, tmp_path):
    (tmp_path / "text").write_text("hello")
    arguments = job.arguments("--mode=evaluate", f"--file={tmp_path / 'text'}")
    runs.assert_refused(runs.main(*arguments), tmp_path / "text")
    arguments = job.arguments("--mode=evaluate", "--config.eval.enabled=False")
    runs.assert_refused(runs.main(*arguments), "config.eval.enabled")
    typo = runs.main(
        "--mode=evaluate", f"--workdir={finished}", "--config.eval.spilt=x"
    )
    runs.assert_refused(typo, "config.eval.spilt: no such key")
    report = runs.main("--mode=report", f"--workdir={finished}", "--config.seed=1")
    runs.assert_refused(report, "config.seed: --mode=report reads no configuration")
    # Without --config, a key changes the configuration of the run.
    override = (f"--workdir={finished}", "--config.eval.split=none")
    runs.assert_refused(runs.main("--mode=evaluate", *override), "'none'")
    no_run = runs.main("--mode=evaluate", f"--workdir={tmp_path}")
    runs.assert_refused(no_run, tmp_path / "config.json")


def test_sample_writes_images_with_labels_and_a_grid(finished, tmp_path):
    finished = shutil.copytree(finished, tmp_path / "run")
    arguments = ("--mode=sample", f"--workdir={finished}", "--count=37")
    done = runs.main(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(finished / "samples.npz"),
        str(finished / "samples.png"),
    ]
    with np.load(finished / "samples.npz") as samples:
        images, labels = samples["images"], samples["labels"]
        assert samples["mean"].shape == samples["std"].shape == (3,)
    assert images.shape == (37, *jobs.SHAPE)
    assert images.dtype == np.float32 and labels.dtype == np.int32
    assert labels.tolist() == [i % 10 for i in range(37)]
    # The generator's last batch norm: mean 0 and variance 1 over each whole batch.
    batch = images[:16].astype(np.float64)
    np.testing.assert_allclose(batch.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(batch.var((0, 1, 2)), 1, atol=1e-2)
    assert len(np.unique(images.reshape(37, -1), axis=0)) == 37
    scale = 64 // 16
    assert Image.open(finished / "samples.png").size == (
        10 * 18 * scale,
        4 * 18 * scale,
    )

    before = (finished / "samples.npz").read_bytes()
    assert runs.main(*arguments).returncode == 0
    assert (finished / "samples.npz").read_bytes() == before


def test_sample_needs_a_run_and_a_count(job, finished, tmp_path):
    arguments = job.arguments("--mode=sample", f"--workdir={tmp_path / 'none'}")
    runs.assert_refused(runs.main(*arguments), tmp_path / "none", "no run there")
    assert list(tmp_path.iterdir()) == []
    few = runs.main("--mode=sample", f"--workdir={finished}", "--count=0")
    runs.assert_refused(few, "--count=0")
