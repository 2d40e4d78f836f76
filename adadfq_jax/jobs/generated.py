"""Images that the G of a run makes, from the run's newest whole checkpoint."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from adadfq_jax import teacher
from adadfq_jax.errors import InputError
from adadfq_jax.game import GameState
from adadfq_jax.models.generator import LATENT_SIZE, get_generator
from adadfq_jax.runtime import sharding
from adadfq_jax.runtime.progress import say
from adadfq_jax.training import build
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.checkpoints import Checkpoints

_STREAM = 2**32 - 1  # of the seed's key; no step of a game gets so far


def restore(config: ConfigDict, workdir: Path) -> GameState:
    """The state in a run's newest whole checkpoint, as numpy arrays.

    Args:
      config: of the run, prepared.
      workdir: of the run; nothing in it is changed.

    Raises:
      InputError: there is no whole checkpoint.
    """
    p = config.teacher
    p_shapes = teacher.variable_shapes(p.model, p.num_classes, p.image_shape)
    parts, inputs = build.game_parts(config), build.make_draw(config, 2)
    like = jax.eval_shape(
        functools.partial(build.initial_state, config, parts, draw=inputs), p_shapes
    )
    checkpoints = Checkpoints(workdir / folder.CHECKPOINTS, config.checkpoint.keep)
    found, sentences = checkpoints.restore_newest(like, read_only=True)
    for sentence in sentences:
        say(f"WARNING: {sentence}")
    if found is None:
        raise InputError(f"{workdir}: no whole checkpoint there to sample from")
    return found.state


def draw(
    config: ConfigDict, workdir: Path, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images that G makes after the newest checkpoint, the same every time.

    Args:
      config: of the run, prepared.
      workdir: of the run.
      count: N.

    Returns:
      Images float32 [N, H, W, C] in P's normalised space, and labels int32 [N], the
      classes in turn.

    Raises:
      InputError: there is no whole checkpoint.
    """
    p, state = config.teacher, restore(config, workdir)
    # The run's own, whatever devices there are here.
    batch_size = folder.read_json(workdir / folder.IDENTITY_FILE)["game.batch_size"]
    generator = get_generator(
        config.game.generator,
        num_classes=p.num_classes,
        image_shape=tuple(p.image_shape),
    )

    @jax.jit
    def make(variables: Any, key: Array, labels: Array) -> Array:
        latents = jax.random.normal(key, (batch_size, LATENT_SIZE))
        # Batch norm sees whole batches, as in the game.
        return generator.apply(variables, latents, labels, mutable=["batch_stats"])[0]

    variables = jax.device_put(
        {"params": state.g_params, "batch_stats": state.g_batch_stats}
    )
    key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
    batches = math.ceil(count / batch_size)
    labels = np.arange(batches * batch_size, dtype=np.int32) % p.num_classes
    images = [
        make(variables, jax.random.fold_in(key, i), share)
        for i, share in enumerate(labels.reshape(batches, batch_size))
    ]
    return np.concatenate(sharding.fetch(images))[:count], labels[:count]
