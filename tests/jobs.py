"""Small jobs: a tiny P, a small data set, a configuration of few steps."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from adadfq_jax import config as base
from adadfq_jax import models, teacher
from tests import eval_sets

ROOT = Path(__file__).parent.parent
CONFIG = f"{ROOT}/configs/cifar10_resnet20.py"
SHAPE = (16, 16, 3)
CLASSES = 10
# Of a small G: with the released 128 a step takes ten times as long.
CHANNELS = 8
# The three blocks of the tiny network, 8 steps each.
RECONSTRUCTED = [
    "--config.reconstruction.iterations=8",
    "--config.reconstruction.images=32",
    "--config.reconstruction.batch_size=8",
]
# Of a run of one step on one device that writes Q's file alone.
ONE_STEP = {
    "game.generator_channels": CHANNELS,
    "game.steps": 1,
    "game.observe_steps": 1,
    "game.warmup_steps": 1,
    "game.batch_size": 4,
    "reconstruction.iterations": 0,
    "checkpoint.every": 0,
    "report.enabled": False,
    "export.onnx": False,
    "export.stablehlo": False,
    "devices": 1,
}
EXPORTED = {"export.onnx": True, "export.stablehlo": True}
RECORDING = {"report.enabled": True, "game.steps": 20, "log.every": 2, **EXPORTED}


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
            f"--config.game.generator_channels={CHANNELS}",
            "--config.game.steps=20",
            "--config.game.observe_steps=6",
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


def tiny_config(job, **overrides):
    """12 steps without evaluation on one device."""
    config = base.default_config()
    values = {
        "devices": 1,
        "teacher.path": str(job.p_file),
        "teacher.model": "tiny",
        "teacher.image_shape": SHAPE,
        "eval.enabled": False,
        # So small that Adam, whose first steps are of the size of the rate however
        # small a gradient is, does not make last bits into other images.
        "game.g_rate": 1e-6,
        "game.q_rate": 1e-6,
        "game.generator_channels": CHANNELS,
        "game.steps": 12,
        "game.observe_steps": 4,
        "game.warmup_steps": 4,
        "log.every": 4,
        "checkpoint.every": 0,
        "report.enabled": False,
        "export.onnx": False,
        "export.stablehlo": False,
    }
    config.update_from_flattened_dict({**values, **overrides})
    return config


def measured(job):
    """Settings of a run with evaluation."""
    data = {"eval.dataset": "small_set", "eval.data_dir": str(job.data_dir)}
    return {**RECORDING, **data, "eval.enabled": True, "eval.batch_size": 32}


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def steps(workdir: Path) -> list[int]:
    """The steps of the log."""
    return [json.loads(row)["step"] for row in (workdir / "metrics.jsonl").open()]


def tree(folder: Path) -> list[str]:
    """Every path under a folder, for comparing before and after."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


BENCHMARK_CONFIG = """
from adadfq_jax import config as base

def get_config(argument=None):
    config = base.default_config()
    config.teacher.model = "tiny"
    config.teacher.image_shape = (8, 8, 3)
    config.game.batch_size = 4
    config.game.framed_weight = 0.5
    config.quant.weight_bits = config.quant.act_bits = int(argument or 4)
    return config
"""


def write_benchmark_config(folder: Path) -> str:
    """A configuration file of the smallest network, for the benchmark."""
    file = folder / "tiny.py"
    file.write_text(BENCHMARK_CONFIG)
    return str(file)
