"""An export that fails at the end of a run."""

import hashlib
import json
import sys

from adadfq_jax.deploy import quantized_file
from tests import runs

# The main job, with an ONNX file of which every kernel has its channels turned around.
BROKEN = """
import dataclasses
from absl import app
from adadfq_jax import main
from adadfq_jax.deploy import export
right = export.to_onnx
def wrong(network, options, **kwargs):
    kernels = {
        name: dataclasses.replace(kernel, codes=kernel.codes[..., ::-1])
        for name, kernel in network.kernels.items()
    }
    return right(dataclasses.replace(network, kernels=kernels), options, **kwargs)
export.to_onnx = wrong
app.run(main.main, flags_parser=main._parse_flags)
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
