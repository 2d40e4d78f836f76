"""An export that fails at the end of a run."""

import hashlib
import json
import shutil
import sys

import pytest

from adadfq_jax.deploy import quantized_file, verify
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import exports, train
from adadfq_jax.report import gather, run_page
from tests import eval_sets, jobs, plain_loader, runs
from tests.jobs import EXPORTED, tiny_config

# The main job, with an ONNX file of which every kernel has its channels turned around.
BROKEN = """
import dataclasses
from absl import app
from adadfq_jax import main
from adadfq_jax.deploy import onnx_file
right = onnx_file.to_onnx
def wrong(network, options, **kwargs):
    kernels = {
        name: dataclasses.replace(kernel, codes=kernel.codes[..., ::-1])
        for name, kernel in network.kernels.items()
    }
    return right(dataclasses.replace(network, kernels=kernels), options, **kwargs)
onnx_file.to_onnx = wrong
app.run(main.main, flags_parser=main.parse_flags)
"""


def test_a_file_that_is_not_q_ends_the_job_with_q_whole(job, tmp_path):
    workdir = tmp_path / "run"
    arguments = job.arguments(
        f"--workdir={workdir}",
        "--config.eval.enabled=False",
        "--config.export.onnx=True",
        "--config.report.enabled=True",
    )
    done = runs.run([sys.executable, "-c", BROKEN, *arguments])
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("error: "))
    assert "quantized.onnx" in line and "250 of images of G" in line
    summary = json.loads((workdir / "summary.json").read_text())
    content = (workdir / "quantized.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == summary["sha256"]
    assert (
        quantized_file.load_quantized(workdir / "quantized.safetensors").info.model
        == "tiny"
    )
    left = {path.name for path in workdir.iterdir()}
    assert not left & {"quantized.onnx", "export.json", "model_card.md"}
    assert (workdir / "report" / "index.html").exists()
    again = runs.main(*arguments)
    assert again.returncode == 0, again.stderr
    assert (workdir / "quantized.onnx").exists()


@pytest.fixture(scope="module")
def unmeasured(job, tmp_path_factory):
    """(config, workdir) of a run without evaluation, its ends at 8 bits."""
    workdir = tmp_path_factory.mktemp("unmeasured") / "run"
    bits = {"weight_bits": 3, "act_bits": 3, "first_last_bits": 8}
    settings = {f"quant.{key}": value for key, value in bits.items()}
    config = tiny_config(job, **settings, **EXPORTED)
    train.run(config, workdir, command="adadfq")
    return config, workdir


def test_without_evaluation_the_check_is_on_images_of_g(unmeasured):
    _, workdir = unmeasured
    record = json.loads((workdir / "export.json").read_text())
    assert set(record["files"]) == {"onnx", "stablehlo", "integer"}
    assert (workdir / "quantized.integer.onnx").exists()
    integer = record["files"].pop("integer")  # not Q, but near it
    assert integer["images_of"] == "images of G" and integer["same_class"] > 0.5
    assert integer["rounded_again"] > 0 and integer["worst_layer"] is None
    for made in record["files"].values():
        assert made["images_of"] == "images of G"
        assert made["images"] == verify.UNLABELLED_IMAGES
        assert made["same_class"] >= verify.SAME_CLASS and made["top1"] is None
    assert "250 of images of G" in (workdir / "model_card.md").read_text()


def test_exporting_a_run_finds_its_g_and_says_where_there_is_none(
    unmeasured, tmp_path, capsys
):
    config, workdir = unmeasured
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "export.json").unlink()
    config.export.stablehlo = False
    line, _ = exports.export_file(config, copy / "quantized.safetensors", copy)
    assert "250 of images of G" in line
    (copy / "export.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    line, _ = exports.export_file(config, copy / "quantized.safetensors", copy)
    assert "250 of random images" in line
    assert (
        "WARNING: exported files are made and checked on random"
        in capsys.readouterr().out
    )
    assert "250 of random images" in (copy / "model_card.md").read_text()


@pytest.fixture
def copied(unmeasured, tmp_path):
    """(config, workdir) of a copy, as the run was."""
    config, workdir = unmeasured
    shutil.copytree(workdir, tmp_path / "run")
    config = config.copy_and_resolve_references()
    config.export.stablehlo = True
    return config, tmp_path / "run"


def test_a_file_that_cannot_be_read_leaves_earlier_exports(copied, tmp_path):
    config, workdir = copied
    before = jobs.tree(workdir)
    (tmp_path / "junk").write_text("hello")
    with pytest.raises(InputError, match="junk: no quantized network"):
        exports.export_file(config, tmp_path / "junk", workdir)
    assert jobs.tree(workdir) == before


def test_another_set_and_a_spoilt_file_are_exported_again(copied, job):
    config, workdir = copied
    file, there = workdir / "quantized.safetensors", workdir / "quantized.onnx"
    right = there.stat().st_mtime_ns
    exports.export_file(config, file, workdir)
    assert there.stat().st_mtime_ns == right  # as it was
    there.write_bytes(b"spoilt")
    config.export.stablehlo = False
    exports.export_file(config, file, workdir)
    digest = json.loads((workdir / "export.json").read_text())["files"]["onnx"][
        "sha256"
    ]
    assert hashlib.sha256(there.read_bytes()).hexdigest() == digest
    there.write_bytes(b"spoilt")
    line, _ = exports.export_file(config, file, workdir)
    assert hashlib.sha256(there.read_bytes()).hexdigest() == digest
    assert "images of G" in line
    config.eval.enabled = True
    config.eval.dataset, config.eval.data_dir = eval_sets.NAME, str(job.data_dir)
    line, _ = exports.export_file(config, file, workdir)
    assert "64 of small_set test" in line


def test_the_table_and_the_card_show_float32_beside(unmeasured):
    _, workdir = unmeasured
    exported, summary = (
        json.loads((workdir / name).read_text())
        for name in ("export.json", "summary.json")
    )
    assert exported["float32_kind"] == "onnx"
    float32 = exported["float32_latency_ms"]
    text = train.results.table(summary, workdir / "quantized.safetensors", exported)
    assert text.count(f"ms an image, float32 {float32['1']:.2f} ms") == 3
    wide = {**exported, "float32_bytes": 10**9, "float32_latency_ms": {"1": 12345.6}}
    text = train.results.table(summary, workdir / "quantized.safetensors", wide)
    assert text.count("float32 12345.6 ms: faster") == 3 and "slower" not in text
    fast = {**exported, "float32_latency_ms": {"1": 0.0}}
    text = train.results.table(summary, workdir / "quantized.safetensors", fast)
    assert text.count("float32 0.00 ms: slower") == 3
    *lines, path = text.splitlines()
    assert max(map(len, lines)) <= 80 and path == str(workdir / "quantized.safetensors")
    card = (workdir / "model_card.md").read_text()
    assert "recipe `adadfq` (AdaDFQ: " in card
    assert "| ms, 64 images |" in card and f"| {float32['64']:.2f} |" in card


def test_ends_of_other_bits_are_labelled_as_another_setting(unmeasured):
    _, workdir = unmeasured
    label = "W3A3 first/last 8"
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["first_last_bits"] == 8
    assert label in run_page.headline(gather.read(workdir))
    card = (workdir / "model_card.md").read_text()
    assert f"# tiny {label}" in card and "another setting than W3A3" in card
    assert label in train.results.table(summary, workdir / "quantized.safetensors")


def test_ends_of_other_bits_are_stored_as_such(unmeasured):
    _, workdir = unmeasured
    file = workdir / "quantized.safetensors"
    network = quantized_file.load_quantized(file)
    bits = {name: kernel.bits for name, kernel in network.kernels.items()}
    assert bits == {
        "init_block.conv.kernel": 8,
        "unit.conv.kernel": 3,
        "output.kernel": 8,
    }
    header, tensors = plain_loader.read(file)
    assert header["layer_bits"] == {
        "init_block.conv.kernel": 8,
        "output.kernel": 8,
        "output.kernel:input": 8,
    }
    for name, kernel in network.kernels.items():
        assert len(set(tensors[name][..., 0].ravel().tolist())) <= 2**kernel.bits
        assert (tensors[name] == kernel.dequantize()).all()
