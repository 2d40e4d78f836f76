"""The job --mode=sample: images that the G of a run makes, as arrays and files."""

import functools
import math
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax import Array

from adadfq_jax.errors import InputError
from adadfq_jax.evaluation.evaluator import to_pixels
from adadfq_jax.game import GameState
from adadfq_jax.jobs.configuration import load_teacher, resolved
from adadfq_jax.models.generator import LATENT_SIZE
from adadfq_jax.network import Function
from adadfq_jax.recipes import Recipe
from adadfq_jax.runtime import extras, files, sharding
from adadfq_jax.runtime.progress import log
from adadfq_jax.training import build
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.checkpoints import Checkpoints
from adadfq_jax.training.reconstruct import Reconstruction, ReconstructionState
from adadfq_jax.training.spec import RunSpec

SAMPLES_FILE = "samples.npz"
GRID_FILE = "samples.png"
GRID_COLUMNS = 10
GRID_MOST = 400  # largest number of images in the grid
# Folded into the seed's key to draw samples; no game has that many steps.
_STREAM = 2**32 - 1


def restore(assembly: Assembly, workdir: Path) -> GameState:
    """Restore the game's state from a run's newest undamaged checkpoint.

    Args:
      assembly: the parts of the run.
      workdir: the folder of the run; nothing in it is changed.

    Returns:
      The state, as numpy arrays.

    Raises:
      InputError: there is no undamaged checkpoint.
    """
    p_shapes = assembly.function.variables
    first = jax.eval_shape(functools.partial(build.initial_state, assembly), p_shapes)
    spec = assembly.spec

    def like(step: int) -> Any:
        if step <= spec.game.steps or not spec.reconstruction.iterations:
            return first
        teacher = jax.eval_shape(assembly.teacher, p_shapes)
        return Reconstruction(assembly, jax.devices()[:1]).like(first, teacher, step)

    checkpoints = Checkpoints(workdir / folder.CHECKPOINTS, spec.checkpoint.keep)
    found, sentences = checkpoints.restore_newest(like, read_only=True)
    for sentence in sentences:
        log.warning(sentence)
    if found is None:
        raise InputError(f"{workdir}: no undamaged checkpoint there to sample from")
    state = found.state
    return state.game if isinstance(state, ReconstructionState) else state


def assemble(
    spec: RunSpec, workdir: Path, function: Function | None = None
) -> Assembly:
    """Return the parts of the run in a folder.

    Args:
      spec: the settings of the run.
      workdir: the folder of the run.
      function: the network; None takes the package's network that the spec names.
    """
    # The batch size is the run's, whatever the number of devices here.
    record = folder.read_json(workdir / folder.IDENTITY_FILE)
    return build.assemble(spec, record["game.batch_size"], function)


def check_run(assembly: Assembly, workdir: Path, function: Function) -> None:
    """Refuse a folder whose run had another configuration or another P.

    Raises:
      InputError: the two differ; the message names the first difference.
    """
    identity = assembly.identity(function.variables)
    # The recipe of the user's own may be missing here, see `configuration.resolved`.
    if not assembly.spec.losses.generator:
        record = folder.read_json(workdir / folder.IDENTITY_FILE)
        identity |= {k: v for k, v in record.items() if k.startswith("recipe.")}
    folder.check(workdir, identity)


def draw(
    assembly: Assembly, workdir: Path, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Make images with the G of the newest checkpoint, the same ones every time.

    Args:
      assembly: the parts of the run.
      workdir: the folder of the run.
      count: the number of images, N.

    Returns:
      Images float32 [N, H, W, C] in P's normalised space, and labels int32 [N], which
      cycle through the classes.

    Raises:
      InputError: there is no undamaged checkpoint.
    """
    state, spec = restore(assembly, workdir), assembly.spec
    batch_size = assembly.batch_size

    @jax.jit
    def make(variables: Any, key: Array, labels: Array) -> Array:
        latents = jax.random.normal(key, (batch_size, LATENT_SIZE))
        # G's batch norms use the statistics of whole batches, as in the game.
        return assembly.parts.networks.g_apply(
            variables, latents, labels, mutable=["batch_stats"]
        )[0]

    variables = jax.device_put(
        {"params": state.g_params, "batch_stats": state.g_batch_stats}
    )
    key = jax.random.fold_in(jax.random.key(spec.seed), _STREAM)
    batches = math.ceil(count / batch_size)
    classes = spec.teacher.num_classes
    labels = np.arange(batches * batch_size, dtype=np.int32) % classes
    images = [
        make(variables, jax.random.fold_in(key, i), share)
        for i, share in enumerate(labels.reshape(batches, batch_size))
    ]
    return np.concatenate(sharding.fetch(images))[:count], labels[:count]


def sample(
    config: Any, workdir: Path, count: int, recipe: Recipe | None = None
) -> list[Path]:
    """Write images that the G of a run makes, for other tools and to look at.

    `samples.npz` holds `images`, float32 [N, H, W, C] in P's normalised space,
    `labels`, int32 [N], which cycle through the classes, and `mean` and `std` of each
    channel: pixels in [0, 1] are images * std + mean. `samples.png` shows the first
    `GRID_MOST` images as a grid.

    Args:
      config: the configuration of the run.
      workdir: the folder of the run; its newest undamaged checkpoint is read.
      count: the number of images, N.
      recipe: see `configuration.resolved`.

    Returns:
      The two files.

    Raises:
      InputError: the folder holds no run of this configuration, or no checkpoint.
    """
    with resolved(config, recipe, trains=False) as spec:
        if count < 1:
            raise InputError(f"--count={count}: must be at least 1")
        if not (workdir / folder.IDENTITY_FILE).exists():
            raise InputError(f"{workdir}: no run there to sample from")
        function, spec = load_teacher(spec)
        assembly = assemble(spec, workdir, function)
        check_run(assembly, workdir, function)
        images, labels = draw(assembly, workdir, count)
    p = spec.teacher
    mean, std = np.asarray(p.mean, np.float32), np.asarray(p.std, np.float32)
    paths = [workdir / SAMPLES_FILE, workdir / GRID_FILE]

    def write_samples(file: IO[bytes]) -> None:
        np.savez(file, images=images, labels=labels, mean=mean, std=std)

    _write_grid(paths[1], to_pixels(images[:GRID_MOST], p.mean, p.std))
    files.write_stream(paths[0], write_samples)
    return paths


def _write_grid(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG with images uint8 [N, H, W, C] in a grid, row by row."""
    try:
        from PIL import Image
    except ImportError as error:
        raise extras.missing("the grid of images", "pillow", "report") from error
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
    scale = max(1, 64 // height)  # enlarge small images, which are hard to see
    image = image.resize(
        (scale * image.width, scale * image.height), Image.Resampling.NEAREST
    )
    files.write_stream(path, functools.partial(image.save, format="PNG"))
