"""What the command line does beside training: evaluate a file, sample from G."""

import functools
import math
from pathlib import Path
from typing import IO

import jax
import numpy as np
from ml_collections import ConfigDict

from adadfq_jax import config as base
from adadfq_jax import models
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import make_student
from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.evaluator import to_pixels
from adadfq_jax.jobs import generated, outcome
from adadfq_jax.runtime import files, sharding
from adadfq_jax.training import build
from adadfq_jax.training import workdir as folder

SAMPLES_FILE = "samples.npz"
GRID_FILE = "samples.png"
GRID_COLUMNS = 10
GRID_MOST = 400  # images in the grid


def evaluate(config: ConfigDict, file: Path) -> str:
    """Top-1 of a P file or a `quantized.safetensors` on the evaluation set.

    Args:
      config: names the evaluation set and, for a P file, what P is; a quantized
        file says that itself.
      file: either kind, told apart by content.

    Returns:
      One line with the accuracy.

    Raises:
      InputError: the file or the evaluation data cannot be used.
    """
    config = build.prepare(config)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    if quantized_file.is_quantized(file):
        network = quantized_file.load_quantized(file)
        info, variables = network.info, network.variables
        apply = make_student(info).apply
        what = f"{info.model} {info.bits}"
    else:
        config.teacher.path = str(file)
        variables = build.load_teacher(config)
        info = build.network_info(config)
        apply = models.get_model(info.model, num_classes=info.num_classes).apply
        what = f"{info.model} in full precision"
    eval_set = outcome.load_eval_set(config, info)
    devices, _ = sharding.choose_devices(config.devices, 1, "per_device")
    evaluator = outcome.make_evaluator(config, info, eval_set, devices)
    top1 = evaluator(apply).top1(sharding.replicate(variables, devices))
    e = config.eval
    return (
        f"{file}: {what}, {base.split_name(e.dataset, e.data_dir, e.split)},"
        f" {eval_set.size:,} images: top-1 {top1:.2f} %"
    )


def export_file(config: ConfigDict, file: Path, folder: Path) -> list[str]:
    """Exports a `quantized.safetensors` as `config.export` says, each file checked.

    Args:
      config: the files that are wanted, and the evaluation set to compare on.
      file: a quantized network.
      folder: where they go.

    Returns:
      A line for every file.

    Raises:
      InputError: the file or the evaluation data cannot be used.
      ExportError: an exported file does not compute what Q does.
    """
    config = build.prepare(config)
    if not (config.export.onnx or config.export.stablehlo):
        raise InputError(
            "config.export.onnx=False and stablehlo=False: nothing to export"
        )
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    record = outcome.export_files(config, file, folder) or {"files": {}}
    return [
        f"{folder / made['file']}: {made['bytes']:,} bytes (float32"
        f" {record['float32_bytes']:,}), takes {made['input']}, on"
        f" {made['images']:,} of {made['images_of']} the class is Q's for"
        f" {100 * made['same_class']:.2f} %"
        + ("" if made["top1"] is None else f", top-1 {made['top1']:.2f} %")
        for made in record["files"].values()
    ]


def sample(config: ConfigDict, workdir: Path, count: int) -> list[Path]:
    """Writes images that the G of a run makes, for other tools and for looking at.

    `samples.npz`: `images` float32 [N, H, W, C] in P's normalised space, `labels`
    int32 [N] (the classes in turn), `mean` and `std` per channel: pixels in [0, 1]
    are images * std + mean. `samples.png`: the first of them as a grid.

    Args:
      config: of the run.
      workdir: of the run; its newest whole checkpoint is read.
      count: N.

    Returns:
      The two files.

    Raises:
      InputError: there is no run of this configuration, or nothing saved yet.
    """
    config = build.prepare(config)
    if count < 1:
        raise InputError(f"--count={count}: must be at least 1")
    if not (workdir / folder.IDENTITY_FILE).exists():
        raise InputError(f"{workdir}: no run there to sample from")
    p_variables = build.load_teacher(config)
    # The run's own, whatever devices there are here.
    batch_size = folder.read_json(workdir / folder.IDENTITY_FILE)["game.batch_size"]
    folder.check(workdir, build.identity(config, p_variables, batch_size))
    images, labels = generated.draw(config, workdir, count)
    p = config.teacher
    mean, std = np.float32(p.mean), np.float32(p.std)
    paths = [workdir / SAMPLES_FILE, workdir / GRID_FILE]

    def write_samples(file: IO[bytes]) -> None:
        np.savez(file, images=images, labels=labels, mean=mean, std=std)

    _write_grid(paths[1], to_pixels(images[:GRID_MOST], p.mean, p.std))
    files.write_stream(paths[0], write_samples)
    return paths


def _write_grid(path: Path, pixels: np.ndarray) -> None:
    """A PNG of images uint8 [N, H, W, C], row by row."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            "the grid needs pillow (pip install -r requirements.txt)"
        ) from error
    gap, (count, height, width, channels) = 2, pixels.shape
    rows = math.ceil(count / GRID_COLUMNS)
    shape = (rows, GRID_COLUMNS, height + gap, width + gap, channels)
    grid = np.full((rows * GRID_COLUMNS, *shape[2:]), 255, np.uint8)
    grid[:count, :height, :width] = pixels
    grid = grid.reshape(shape).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * shape[2], GRID_COLUMNS * shape[3], channels)
    if channels not in (1, 3):
        grid = grid[..., :1]
    image = Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid)
    scale = max(1, 64 // height)  # small images are hard to see
    image = image.resize(
        (scale * image.width, scale * image.height), Image.Resampling.NEAREST
    )
    files.write_stream(path, functools.partial(image.save, format="PNG"))
