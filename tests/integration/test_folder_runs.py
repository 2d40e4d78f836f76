"""The command line on a folder of JPEGs: a run, its report, its exports, measuring."""

import json
import re
import shutil

import numpy as np
import pytest

from adadfq_jax import load_quantized, models, teacher
from adadfq_jax.evaluation.evaluator import normalise
from tests import eval_sets, image_files, jobs, runs

NAMES = [f"class{i}" for i in range(jobs.CLASSES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty JPEGs of ten classes."""
    folder = tmp_path_factory.mktemp("images") / "val"
    image_files.write(folder, NAMES, 6)
    return folder


def on_folder(job, folder, *others):
    return job.arguments(
        "--config.eval.dataset=folder",
        f"--config.eval.data_dir={folder}",
        "--config.eval.resize=20",
        "--config.eval.batch_size=25",
        *others,
    )


def top1(done):
    assert done.returncode == 0, done.stderr
    return [row.rsplit(" ", 2)[1] for row in done.stdout.splitlines() if "top-1" in row]


def test_a_run_measures_reports_and_checks_on_a_folder(job, folder, tmp_path):
    workdir = tmp_path / "run"
    shown = ("--config.report.enabled=True", "--config.export.onnx=True")
    done = runs.main(*on_folder(job, folder, f"--workdir={workdir}", *shown))
    assert done.returncode == 0, done.stderr
    assert "classes sorted by name: class0 is 0, class9 is 9" in done.stdout
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["dataset"] == "folder val"
    exported = json.loads((workdir / "export.json").read_text())["files"]["onnx"]
    assert (exported["images"], exported["images_of"]) == (60, "folder val")
    assert "measured on folder val" in (workdir / "report" / "index.html").read_text()
    paths = [(path, i) for i, n in enumerate(NAMES) for path in (folder / n).iterdir()]
    pixels = [image_files.prepare(path, 20, 16) for path, _ in paths]
    labels = np.asarray([label for _, label in paths])
    eval_sets.write(tmp_path, pixels, labels, 10, name="cifar10")
    arrays = (
        "--config.eval.dataset=cifar10",
        "--config.eval.resize=0",
        f"--config.eval.data_dir={tmp_path}",
    )
    measure = ("--mode=evaluate", f"--workdir={workdir}")
    by_files = top1(runs.main(*on_folder(job, folder, *measure)))
    by_arrays = top1(runs.main(*on_folder(job, folder, *measure, *arrays)))
    found = [f"{summary[key]:.2f}" for key in ("p_top1", "q_last_top1")]
    assert by_files == by_arrays == found


def test_without_classes_q_is_compared_with_p(job, finished, folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.rglob("*.JPEG"):
        shutil.copy(path, flat / path.name)
    (flat / "Thumbs.db").write_bytes(bytes(9))
    measure = ("--mode=evaluate", f"--workdir={finished}")
    done = runs.main(*on_folder(job, flat, *measure))
    assert done.returncode == 0, done.stderr
    assert "60 images, no classes; 1 other files skipped (Thumbs.db)" in done.stdout
    *_, last = done.stdout.splitlines()
    found = re.fullmatch(
        rf"{finished}/quantized.safetensors: tiny W4A4, folder flat, 60 images without"
        rf" classes: answers as {job.p_file} does on (\d+\.\d\d) %",
        last,
    )
    pixels = [image_files.prepare(path, 20, 16) for path in sorted(flat.glob("*.JPEG"))]
    network = load_quantized(finished / "quantized.safetensors")
    images = normalise(np.stack(pixels), network.mean, network.std)
    p = models.get_model("tiny", num_classes=jobs.CLASSES)
    p_classes = p.apply(teacher.load(job.p_file, "tiny"), images).argmax(-1)
    same = (np.asarray(network(images)).argmax(-1) == p_classes).sum()
    # An image at the edge of two classes may differ between two compilations.
    assert abs(float(found[1]) - 100 * same / 60) <= 100 * 2 / 60
    only_p = ("--mode=evaluate", f"--file={job.p_file}")
    done = runs.main(*on_folder(job, flat, *only_p))
    runs.assert_refused(done, flat, "--file", "config.teacher.path")


def test_a_spoilt_image_ends_the_run_with_its_name(job, tmp_path):
    image_files.write(tmp_path / "val", NAMES, 1)
    (tmp_path / "val" / "class3" / "class3_0.JPEG").write_text("no image")
    measure = ("--mode=evaluate", f"--file={job.p_file}")
    done = runs.main(*on_folder(job, tmp_path / "val", *measure))
    runs.assert_refused(done, "class3_0.JPEG", "no known format")
