"""An ONNX file as P in every job; the quantized file then needs no other file."""

import functools
import json
import shlex
from pathlib import Path

import jax
import numpy as np
import onnx
import pytest
import safetensors.numpy

import adadfq_jax
from adadfq_jax.jobs import evaluate, exports, inspection, samples, sensitivity, train
from adadfq_jax.report import run_page
from tests import eval_sets, helpers, jobs, onnx_networks, runs, torch_files


def configuration(job, path, **values):
    return jobs.tiny_config(
        job,
        **{
            "teacher.path": str(path),
            "teacher.model": "",
            "teacher.num_classes": 0,
            "teacher.image_shape": (),
            "teacher.mean": (),
            "teacher.std": (),
            "game.steps": 4,
            "game.observe_steps": 2,
            "game.warmup_steps": 2,
            "game.batch_size": 4,
            **values,
        },
    )


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
    """A run whose P was an ONNX file; that file is gone."""
    folder = tmp_path_factory.mktemp("onnx")
    path = folder / "net.onnx"
    onnx.save(onnx_networks.shufflenet(), path)
    config = configuration(job, path)
    train.run(config, folder / "run", command="adadfq train")
    images, _ = samples.sample(config, folder / "run", 8)
    assert np.load(images)["images"].shape == (8, 16, 16, 3)
    _, _, file, _ = sensitivity.measure(config, folder / "run")
    assert json.loads(Path(file).read_text())["layers"]
    path.unlink()
    return folder / "run"


def test_the_quantized_file_is_loaded_alone(run):
    network = adadfq_jax.load_quantized(run / "quantized.safetensors")
    assert (network.info.model, network.num_classes) == ("net", 5)
    assert network.mean == (0.485, 0.456, 0.406)
    assert network(onnx_networks.images(2)).shape == (2, 5)
    again = network.save(run.parent / "again.safetensors")
    assert again.read_bytes() == (run / "quantized.safetensors").read_bytes()


def test_the_quantized_file_is_measured_alone(run, job, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    eval_sets.write(tmp_path, pixels, np.arange(16) % 5, 5)
    data = {"eval.dataset": eval_sets.NAME, "eval.data_dir": str(tmp_path)}
    config = configuration(job, "", **data, **{"eval.enabled": True})
    line = evaluate.evaluate(config, run / "quantized.safetensors")
    assert "net W4A4" in line and "16 images" in line


def test_the_quantized_file_is_exported_and_reported_alone(run, job):
    config = configuration(job, "", **{"export.onnx": True})
    lines = exports.export_file(config, run / "quantized.safetensors", run)
    assert "quantized.onnx" in lines[0]
    assert all("images of G" in line for line in lines)
    assert run_page.write(run).exists()


def test_the_exported_file_is_read_again_as_p(run):
    """The package's own ONNX files in float32, of which Q's are made."""
    from adadfq_jax.deploy.onnx_file import OnnxOptions, to_onnx

    network = adadfq_jax.load_quantized(run / "quantized.safetensors")
    model = to_onnx(network, OnnxOptions(layout="NCHW"), quantized=False)
    path = run.parent / "exported.onnx"
    onnx.save(model, path)
    again = adadfq_jax.load_network(path, batch_norms=False)
    x = onnx_networks.images(3)
    with jax.default_matmul_precision("highest"):
        ours = again.apply(again.variables, x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (theirs,) = session.run(None, {"images": x.transpose(0, 3, 1, 2)})
    helpers.assert_close(ours, theirs, 1e-5)


def test_quantize_takes_a_loaded_network(tmp_path):
    onnx.save(onnx_networks.shufflenet(), tmp_path / "small.onnx")
    network = adadfq_jax.load_network(tmp_path / "small.onnx")
    rates = {"game.g_rate": 1e-6, "game.q_rate": 1e-6}  # of the run above
    settings = {**jobs.ONE_STEP, **rates}
    q = adadfq_jax.quantize(network, recipe="adadfq", settings=settings)
    assert (q.info.model, q.num_classes, q.image_shape) == ("small", 5, (16, 16, 3))
    path = q.save(tmp_path / "q.safetensors")
    x = onnx_networks.images(2)
    for again in (
        adadfq_jax.load_quantized(path),
        adadfq_jax.load_quantized(path, network),
    ):
        assert np.array_equal(again(x), q(x))


def write_onnx(folder, job):
    onnx.save(onnx_networks.resnet(), folder / "my net.onnx")
    return folder / "my net.onnx", ""


def write_torch(folder, job, **form):
    arrays = safetensors.numpy.load_file(job.p_file)
    state_dict = torch_files.tensors(arrays)
    torch_files.save(folder / "p.pth", {"state_dict": state_dict}, **form)
    return folder / "p.pth", "tiny"


FILES = {
    "ONNX": write_onnx,
    "PyTorch checkpoint (zip)": write_torch,
    "PyTorch checkpoint (legacy)": functools.partial(write_torch, legacy=True),
    "safetensors": lambda folder, job: (job.p_file, "tiny"),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_command_of_inspect_works_as_printed(tmp_path, job, kind):
    path, name = FILES[kind](tmp_path, job)
    description = inspection.describe(path, name)
    assert description.startswith(f"{path}: {kind}, ")
    lines = description.partition("quantize    yes:\n")[2]
    printed = lines[: lines.rindex("\n")].replace("\\\n", " ")
    program, *words = shlex.split(printed)
    assert program == "python" and words[:2] == ["-m", "adadfq_jax.main"]
    short = [f"--config.{key}={value}" for key, value in jobs.ONE_STEP.items()]
    if kind != "ONNX":
        short.append("--config.teacher.image_shape=(8, 8, 3)")
    assert ("--config.teacher.image_shape=(32, 32, 3)" in words) is (kind != "ONNX")
    shortened = ("--workdir", "--config.teacher.image_shape")
    words = [word for word in words if not word.startswith(shortened)]
    place = f"--workdir={tmp_path / 'run'}"
    done = runs.main(*words[2:], place, *short)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "quantized.safetensors").exists()
