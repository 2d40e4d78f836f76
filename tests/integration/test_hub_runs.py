"""A run whose P is in a repository of the Hugging Face Hub."""

import json
import shlex
import shutil

import pytest
import safetensors.numpy

import adadfq_jax
from adadfq_jax import api
from adadfq_jax.jobs import inspection
from tests import eval_sets, jobs, runs
from tests.hub import COMMIT, Hub


@pytest.fixture
def hub(job, tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    facts = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3}
    hub.write("me/tiny", facts, safetensors.numpy.load_file(job.p_file))
    return hub


def test_quantize_takes_the_mean_and_std_of_the_repository(hub, monkeypatch):
    monkeypatch.setattr(api, "_quantize_in_memory", lambda spec, function: spec)
    network = adadfq_jax.load_network("hf://me/tiny", "tiny")
    p = adadfq_jax.quantize(network).teacher
    assert (p.mean, p.std) == ((0.5,) * 3, (0.25,) * 3)
    p = adadfq_jax.quantize(network, mean=(0.4,) * 3, std=(0.2,) * 3).teacher
    assert (p.mean, p.std) == ((0.4,) * 3, (0.2,) * 3)


def test_the_command_of_inspect_makes_a_workdir_that_needs_no_network(
    hub, job, tmp_path
):
    description = inspection.describe("hf://me/tiny", "tiny")
    printed = description.partition("quantize    yes:\n")[2].replace("\\\n", " ")
    words = [w for w in shlex.split(printed)[3:] if not w.startswith("--workdir")]
    workdir = f"--workdir={tmp_path / 'run'}"
    short = [f"--config.{key}={value}" for key, value in jobs.ONE_STEP.items()]
    done = runs.main(*words, workdir, *short)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["teacher"]
    assert kept["path"] == f"hf://me/tiny@{COMMIT}"
    assert (kept["mean"], kept["image_shape"]) == ([0.5] * 3, [16, 16, 3])

    hub.online = False
    again = runs.main(*words, workdir, *short)
    assert again.returncode == 0, again.stderr
    shutil.rmtree(hub.cache)
    measured = runs.main(
        "--mode=evaluate",
        workdir,
        f"--config={words[0].partition('=')[2]}",
        "--config.teacher.path=hf://me/tiny",
        f"--config.eval.dataset={eval_sets.NAME}",
        f"--config.eval.data_dir={job.data_dir}",
    )
    assert measured.returncode == 0, measured.stderr
    first, second = measured.stdout.splitlines()
    assert first.startswith("P is not measured: hf://me/tiny: it is not in the cache")
    assert "tiny W4A4" in second and "64 images: top-1" in second
    runs.assert_refused(
        runs.main(*words, f"--workdir={tmp_path / 'new'}", *short),
        "hf://me/tiny: it is not in the cache, and cannot be reached",
    )
