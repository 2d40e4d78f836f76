"""The main job from the command line, end to end, shortened."""

import json
import sys

import numpy as np
import pytest

from adadfq_jax import config as base
from adadfq_jax.deploy import quantized_file
from tests import eval_sets, helpers, jobs, runs
from tests.jobs import ROOT

CONFIG = f"{ROOT}/configs/fashion_mnist_resnet20.py"
SHORT = [
    "--config.recipe=adadfq_tuned",
    "--config.game.generator_channels=16",
    "--config.game.steps=8",
    "--config.game.observe_steps=2",
    "--config.game.warmup_steps=3",
    "--config.log.every=2",
    "--config.game.q_rate=1e-5",
    "--config.eval.split=test[:200]",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w4a4"
    done = runs.main(f"--config={CONFIG}:w4a4", f"--workdir={workdir}", *SHORT)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_the_workdir_has_what_others_rely_on(finished):
    workdir, _ = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "command.txt",
        "config.json",
        "encodings.json",
        "export.json",
        "identity.json",
        "metrics.jsonl",
        "model_card.md",
        "quantized.integer.onnx",
        "quantized.onnx",
        "quantized.safetensors",
        "quantized.stablehlo",
        "recordings",
        "report",
        "summary.json",
    }
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["p_top1"] == pytest.approx(95.0)  # of these 200
    # Two steps of observing an untrained G make a Q that is far from P, not chance,
    # and at this rate five steps change little.
    tops = [entry["q_top1"] for entry in summary["evaluations"]]
    assert 25 < tops[0] < summary["p_top1"]
    assert summary["q_before_top1"] == tops[0]
    assert summary["q_last_top1"] == tops[-1] == pytest.approx(tops[0], abs=15)
    assert summary["q_best_top1"] == max(tops[1:])
    assert (summary["weight_bits"], summary["act_bits"]) == (4, 4)
    assert (summary["steps"], summary["seed"], summary["format_version"]) == (8, 0, 3)
    assert summary["bytes"] == (workdir / "quantized.safetensors").stat().st_size
    assert summary["seconds"] > 0
    assert summary["versions"]["jax"]
    assert "cpu" in summary["device"]
    assert [e["step"] for e in summary["evaluations"]] == [3, 4, 6, 8]
    config = json.loads((workdir / "config.json").read_text())
    assert config["game"]["steps"] == 8


def test_the_log_has_a_line_per_interval_and_phase(finished):
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").open()]
    assert [r["step"] for r in rows] == [2, 3, 4, 6, 8]
    assert [r["phase"] for r in rows] == ["observe", "g_only", "both", "both", "both"]
    for row in rows:
        terms = ("margin", "disagreement", "agreement", "bn_stats", "generator")
        for name in (*terms, "student", "p_agrees", "steps_per_second"):
            assert isinstance(row[name], float), name
        quantiles = [row[n] for n in ("h_min", "h_q10", "h_q50", "h_q90", "h_max")]
        assert quantiles == sorted(quantiles)
        assert 0 <= row["h_mean"] <= 1
        total = row["margin"] + 0.2 * row["disagreement"] + 0.1 * row["agreement"]
        assert row["generator"] == pytest.approx(total + row["bn_stats"], rel=1e-4)
        assert row["g_rate"] == pytest.approx(1e-3)
    assert [bool(r["q_rate"]) for r in rows] == [False, False, True, True, True]


def test_it_ends_with_a_table_that_fits_a_terminal(finished):
    workdir, output = finished
    assert "Q last" in output
    table, _, path = output.split("no real image used")[1].rstrip().rpartition("\n")
    assert max(map(len, table.splitlines())) <= 80
    assert path == str(workdir / "quantized.safetensors")
    summary = json.loads((workdir / "summary.json").read_text())
    assert f"{summary['q_last_top1']:.2f} %" in output
    assert "WARNING" not in output
    exported = json.loads((workdir / "export.json").read_text())
    for kind, made in exported["files"].items():
        assert made["images"] == 200
        lost = summary["q_last_top1"] - made["top1"]
        # Half a point is an image. The integer file has more levels than Q.
        assert lost <= 0.5 and (kind == "integer" or lost >= -0.5)
        assert f" {made['file'].removeprefix('quantized.')} " in output
    card = (workdir / "model_card.md").read_text()
    assert summary["command"] in card and f"{summary['q_last_top1']:.2f} %" in card
    assert "fashion_mnist_resnet20.safetensors" in card


def test_the_exported_network_is_rebuilt(finished):
    network = quantized_file.load_quantized(finished[0] / "quantized.safetensors")
    assert network.info.image_shape == (28, 28, 1)
    assert network(np.zeros((2, 28, 28, 1), np.float32)).shape == (2, 10)


def test_training_runs_without_evaluation_and_without_tfds(tmp_path):
    """A folder in front of the path in which TFDS does not import; two devices."""
    job = jobs.make_job(tmp_path)
    (tmp_path / "tensorflow_datasets.py").write_text("raise ImportError('not here')")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}];"
        "from absl import app; from adadfq_jax import main;"
        "app.run(main.main, flags_parser=main.command_line.parse_flags)"
    )
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", code, *job.arguments(f"--workdir={workdir}")]
    runs.assert_refused(runs.run(command, devices=2), "tensorflow-datasets")
    assert not workdir.exists()

    command += ["--config.eval.enabled=False", "--config.report.enabled=True"]
    done = runs.run(command, devices=2)
    assert done.returncode == 0, done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["p_top1"] is None
    assert summary["q_last_top1"] is None
    assert summary["device"].startswith("2 x")
    assert (workdir / "report" / "index.html").exists()


def test_the_cifar10_config_from_a_pytorch_file_to_the_table(tmp_path):
    """On a real file of the original's format and a small set in CIFAR-10's form."""
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    eval_sets.write(tmp_path, images, np.arange(40) % 10, 10, name="cifar10")
    workdir = tmp_path / "run"
    done = runs.main(
        f"--config={ROOT}/configs/cifar10_resnet20.py:w3a3",
        f"--config.teacher.path={helpers.GOLDEN / 'resnet20_cifar10_zip.pth'}",
        f"--config.eval.data_dir={tmp_path}",
        f"--workdir={workdir}",
        "--config.game.generator_channels=8",
        "--config.game.steps=6",
        "--config.game.observe_steps=2",
        "--config.game.warmup_steps=2",
        "--config.game.batch_size=4",
        "--config.eval.between=0",
        "--config.report.enabled=False",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["dataset"] == "cifar10"
    # Of 40 images each is 2.5 %; the file's weights are random.
    assert summary["p_top1"] % 2.5 == summary["q_last_top1"] % 2.5 == 0
    assert "WARNING" in done.stdout and "config.teacher.mean" in done.stdout
    assert (workdir / "quantized.safetensors").exists()


def test_help_version_and_keys_are_for_people():
    helped = runs.main_apart("--help")
    for word in (
        "--mode=evaluate",
        "--mode=report",
        "--mode=compare",
        "quiet",
        "--workdir",
        "Exit codes",
        "--count",
        "75",
    ):
        assert word in helped.stdout, word
    assert max(map(len, helped.stdout.splitlines())) <= 100
    assert runs.main_apart("--version").stdout.startswith("adadfq_jax ")
    assert runs.main("--keys").stdout.strip() == base.reference()
