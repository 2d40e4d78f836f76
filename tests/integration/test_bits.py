"""Bits per layer in runs: a budget, a calibration, and the sensitivities of a run."""

import json
import shutil

import jax
import numpy as np
import pytest

import adadfq_jax
from adadfq_jax import config as base
from adadfq_jax.deploy import quantized_file
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import population, sensitivity, train
from adadfq_jax.report import gather, run_page
from adadfq_jax.training import budget
from tests import jobs
from tests.own_networks import SHAPE, Small

CALIBRATED = {
    "recipe": "calibrate",
    "quant.budget": "bits=3.5",
    "quant.layer_bits": "output=w8",
    "game.steps": 4,
    "game.observe_steps": 4,
    "game.warmup_steps": 4,
    "calibration.images": 64,
}


@pytest.fixture(scope="module")
def budgeted(job, tmp_path_factory):
    """(configuration, workdir) of a calibrated run whose bits a budget chose."""
    workdir = tmp_path_factory.mktemp("budgeted") / "run"
    settings = {**jobs.measured(job), **CALIBRATED}
    settings |= {"export.onnx": False, "export.stablehlo": False}
    config = jobs.tiny_config(job, **settings)
    train.run(config, workdir, command="adadfq train")
    return config, workdir


def read(file):
    return json.loads(file.read_text())


def test_a_budget_chooses_bits_that_the_file_has(budgeted):
    _, workdir = budgeted
    chosen, summary = read(workdir / "layer_bits.json"), read(workdir / "summary.json")
    assert summary["layer_bits"] == chosen and chosen["output.kernel"] == 8
    network = quantized_file.load_quantized(workdir / "quantized.safetensors")
    assert network.info.bits == "W4A4 mixed"
    kernels = network.kernels
    assert [k.bits for k in kernels.values()] == [chosen.get(n, 4) for n in kernels]
    values = [k.codes.size for k in kernels.values()]
    mean = np.average([k.bits for k in kernels.values()], weights=values)
    assert 3 <= mean <= 3.5
    assert "W4A4 mixed" in run_page.headline(gather.read(workdir))


def test_a_calibrated_run_is_measured_before_and_after(budgeted):
    _, workdir = budgeted
    summary = read(workdir / "summary.json")
    assert summary["calibrated"] and summary["steps"] == 4
    assert [each["step"] for each in summary["evaluations"]] == [4, 5]
    assert summary["q_before_top1"] == summary["evaluations"][0]["q_top1"]
    assert [s.step for s in gather.read(workdir).snapshots] == [4, 5]
    page = (workdir / "report" / "index.html").read_text()
    assert "calibrated, not trained" in page
    told = train.results.table(summary, workdir / "quantized.safetensors")
    assert "calibrated after step 4" in told


def test_a_resumed_run_does_not_choose_again(budgeted, tmp_path, monkeypatch):
    config, workdir = budgeted
    copy = shutil.copytree(workdir, tmp_path / "run")
    digest = read(copy / "summary.json")["sha256"]
    for name in ("summary.json", "quantized.safetensors"):
        (copy / name).unlink()
    monkeypatch.setattr(budget, "choose", None)
    assert train.run(config, copy)["sha256"] == digest


def test_the_sensitivities_of_a_run_come_into_its_report(budgeted, tmp_path):
    _, workdir = budgeted
    copy = shutil.copytree(workdir, tmp_path / "run")
    config = base.from_json(read(copy / "config.json"))
    table, _, file, report = sensitivity.measure(config, copy)
    _, _, head, _, *rows = table.splitlines()
    assert head.split()[:2] == ["layer", "size"] and len(rows) == 3
    found = read(copy / "sensitivity.json")
    assert file == str(copy / "sensitivity.json") and report.startswith("report: ")
    names = {layer["name"] for layer in found["layers"]}
    assert names == {"init_block.conv", "unit.conv", "output"}
    page = (copy / "report" / "index.html").read_text()
    assert "Sensitivity of each layer" in page and "At 4 bits" in page
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        list(sensitivity.measure(base.from_json({**config.to_dict(), "seed": 1}), copy))
    (copy / "sensitivity.json").write_text("{")
    assert "sensitivity.json is damaged" in gather.read(copy).notes[0]


def test_budgets_that_nothing_keeps_and_populations_are_refused(
    job, tmp_path, monkeypatch
):
    monkeypatch.setattr(budget, "play_short", None)  # refused before any game
    config = jobs.tiny_config(job, **CALIBRATED)
    config.quant.budget = "size=0.1kB"
    with pytest.raises(InputError, match=r"config\.quant\.budget: too small; Q's file"):
        train.run(config, tmp_path / "small")
    # The same command with another budget may have the folder.
    assert not (tmp_path / "small" / "identity.json").exists()
    config.population = "seed=0,1"
    with pytest.raises(InputError, match=r"config\.quant\.budget: a population"):
        population.run(config, tmp_path / "several")
    assert not (tmp_path / "several").exists()


def test_a_size_in_bytes_is_kept(job, tmp_path):
    config = jobs.tiny_config(job, **CALIBRATED)
    config.quant.budget = "size=4kB"
    summary = train.run(config, tmp_path / "run")
    assert 3500 < summary["bytes"] <= 4000


def test_from_python():
    model, image = Small(), np.zeros((1, *SHAPE), np.float32)
    variables = model.init(jax.random.key(0), image)

    def quantize(**options):
        settings = {
            "devices": 1,
            "game.generator_channels": jobs.CHANNELS,
            "calibration.images": 16,
        }
        return adadfq_jax.quantize(
            *(model, variables), image_shape=SHAPE, settings=settings, **options
        )

    network = quantize(steps=0, layer_bits="Dense_0=w8a8,Conv.*=w3")
    assert network.info.bits == "W4A4 mixed"
    assert [kernel.bits for kernel in network.kernels.values()] == [3, 3, 8]
    assert network.options.bits_of_activation("Dense_0.kernel:input") == 8
    with pytest.raises(InputError, match=r"layer_bits: 'dense' matches no layer"):
        quantize(steps=0, layer_bits="dense=w8")
