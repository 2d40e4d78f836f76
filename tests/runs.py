"""Short runs of the main job in processes of their own: a tiny P, a small data set."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from adadfq_jax import models, teacher
from tests import eval_sets

ROOT = Path(__file__).parent.parent
CONFIG = f"{ROOT}/configs/cifar10_resnet20.py"
SHAPE = (16, 16, 3)
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Job:
    """What the runs need: P's file and the evaluation set's folder."""

    p_file: Path
    data_dir: Path

    def arguments(self, *others: str) -> list[str]:
        """Of a run of 20 steps with checkpoints every 4."""
        return [
            f"--config={CONFIG}:w4a4",
            f"--config.teacher.path={self.p_file}",
            "--config.teacher.model=tiny",
            f"--config.teacher.image_shape={SHAPE}",
            f"--config.eval.dataset={eval_sets.NAME}",
            f"--config.eval.data_dir={self.data_dir}",
            "--config.eval.between=2",
            "--config.game.steps=20",
            "--config.game.observe_steps=3",
            "--config.game.warmup_steps=6",
            "--config.log.every=5",
            "--config.checkpoint.every=4",
            "--config.export.onnx=False",
            "--config.export.stablehlo=False",
            "--config.report.enabled=False",
            *others,
        ]


def make_job(folder: Path, classes: int = CLASSES) -> Job:
    """Writes a random P and 64 random images."""
    model = models.get_model("tiny", num_classes=classes)
    variables = jax.jit(model.init)(jax.random.key(7), np.zeros((1, *SHAPE)))
    p_file = folder / "p.safetensors"
    teacher.save(p_file, jax.device_get(variables), {})
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, *SHAPE), np.uint8)
    eval_sets.write(folder / "data", images, np.arange(64) % classes, classes)
    return Job(p_file, folder / "data")


def command(*arguments) -> list[str]:
    """The main job's command line."""
    return [sys.executable, "-m", "adadfq_jax.main", *map(str, arguments)]


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process with so many CPU devices, quick to compile for."""
    flags = (
        f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0"
    )
    return {**os.environ, "XLA_FLAGS": flags}


def run(command, devices=1, env=None, timeout=900):
    """The finished process of a command in the root, its output as text."""
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**environment(devices), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def main(*arguments, devices=1):
    """The finished process of the main job."""
    return run(command(*arguments), devices)


def steps(workdir: Path) -> list[int]:
    """The steps of the log."""
    return [json.loads(row)["step"] for row in (workdir / "metrics.jsonl").open()]


def tree(folder: Path) -> list[str]:
    """Every path under a folder, for comparing before and after."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def assert_refused(done, *named):
    """Exit code 2 and one line that has every one of `named`."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    for name in named:
        assert str(name) in lines[0], lines[0]
