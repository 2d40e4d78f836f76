"""From a configuration to the things that play: P, the compiled steps, the measures.

This is where plain values are read off the ConfigDict and handed down.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adadfq_jax import config as base
from adadfq_jax import game, models, optim, recipes, teacher
from adadfq_jax.config import check
from adadfq_jax.deploy.network import NetworkInfo, layer_bits, make_student
from adadfq_jax.errors import InputError
from adadfq_jax.game import GameState, Phase, framing, rollout
from adadfq_jax.losses import Loss
from adadfq_jax.models.generator import draw_inputs, get_generator
from adadfq_jax.quant import is_kernel
from adadfq_jax.runtime import sharding
from adadfq_jax.runtime.progress import say

_REESTIMATION_STREAM = 2**31 - 2  # of the draws after the last step
_FRAMES_STREAM = 2  # of a step's key, which is split into 0 and 1: latents, labels

# (phase, steps in a dispatch) -> the compiled function.
Steps = Callable[[Phase, int], Callable[..., tuple[GameState, dict[str, jax.Array]]]]


def prepare(config: ConfigDict) -> ConfigDict:
    """A copy with what the recipe decides filled in, checked.

    Raises:
      InputError: there is no such recipe, or a value cannot work.
    """
    recipe = recipes.get(config.recipe)
    values = config.copy_and_resolve_references()
    for section, settings in (
        (values.game, recipe.settings),
        (values.quant, recipe.quantizer),
    ):
        for key in section:
            if section[key] is None:
                if key not in settings:
                    raise InputError(
                        f"config.recipe={config.recipe!r}: has no {key}; make it of"
                        " another recipe by its `adding`"
                    )
                section[key] = settings[key]
    check.check(values)
    values.eval.enabled = base.measures(values.eval)
    return values


def network_info(config: ConfigDict) -> NetworkInfo:
    """The description of Q that goes into the exported file."""
    p = config.teacher
    return NetworkInfo(
        model=p.model,
        num_classes=p.num_classes,
        image_shape=tuple(p.image_shape),
        mean=tuple(p.mean),
        std=tuple(p.std),
        weight_bits=config.quant.weight_bits,
        act_bits=config.quant.act_bits,
        first_last_bits=config.quant.first_last_bits,
    )


def load_teacher(config: ConfigDict) -> Any:
    """P's variables, checked against what the configuration says of P.

    A config.teacher.model of '' becomes the network that the file is of.
    """
    p = config.teacher
    if p.model:
        models.get_model(p.model, num_classes=p.num_classes)  # a name that is known
    if not p.path:
        raise InputError("config.teacher.path='': it must name P's file")
    variables, found = teacher.read(p.path, p.model)
    if not p.model:
        p.model = found.model
        note = f"; {found.note}" if found.note else ""
        say(f"{p.path}: {found.model} in {found.scheme} naming{note}")
    expected = teacher.variable_shapes(p.model, p.num_classes, p.image_shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        array: Any = functools.reduce(lambda tree, key: tree[key.key], path, variables)
        if array.shape != leaf.shape:
            raise InputError(
                f"{p.path}: {jax.tree_util.keystr(path)} is {array.shape}, but"
                f" config.teacher (num_classes={p.num_classes},"
                f" image_shape={tuple(p.image_shape)}) needs {leaf.shape}"
            )
    wrong = teacher.defect(variables)
    if wrong:
        raise InputError(f"{p.path}: {wrong}")
    return variables


def _compute_in(dtype: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` with its floating inputs, and so its layers, in `dtype`.

    Parameters and statistics stay float32, and so does what comes out.
    """
    if dtype == "float32":
        return apply

    def cast_inputs(variables, x, *others, **kwargs):
        out = apply(variables, x.astype(dtype), *others, **kwargs)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out)

    return cast_inputs


class Values(NamedTuple):
    """The numbers in which games that share a program may differ; may be traced.

    settings: of the losses, by `config.game` key. g_weights, q_weights: of the terms
    of G's and Q's loss, by name. g_rates, q_rates: between the drops, float32
    [drops + 1].
    """

    settings: dict[str, Any]
    g_weights: dict[str, Any]
    q_weights: dict[str, Any]
    g_rates: Any
    q_rates: Any


def game_values(config: ConfigDict) -> Values:
    """The numbers of a configuration, as they are written: not rounded to float32."""
    g, recipe = config.game, recipes.get(config.recipe)
    settings = {**recipe.settings, **g.to_dict()}
    drops, factor = len(g.rate_drops), g.rate_drop_factor
    return Values(
        settings={key: settings[key] for key in base.LOSS_SETTINGS},
        g_weights=dict(recipes.weigh(recipe.generator, settings)),
        q_weights=dict(recipes.weigh(recipe.student, settings)),
        g_rates=optim.decayed(g.g_rate, drops, factor),
        q_rates=optim.decayed(g.q_rate, drops, factor),
    )


class GameParts(NamedTuple):
    """What a game is made of: the arguments of `game.make_play`."""

    networks: game.Networks
    generator_loss: Loss
    student_loss: Loss
    g_optimizer: optim.Optimizer
    q_optimizer: optim.Optimizer
    q_options: game.QOptions


def _modules(config: ConfigDict, axis_name: str | None = None):
    """G and Q of a configuration."""
    p = config.teacher
    generator = get_generator(
        config.game.generator,
        num_classes=p.num_classes,
        image_shape=tuple(p.image_shape),
        axis_name=axis_name,
    )
    quant = config.quant
    return generator, make_student(
        network_info(config),
        range_ema=quant.range_ema,
        range_of=quant.act_range,
        masked=quant.mask_gradient,
        learned=quant.learn_ranges,
        axis_name=axis_name,
    )


def make_draw(config: ConfigDict, batch_size: int) -> Callable[[jax.Array], game.Batch]:
    """Key -> what is drawn for the global batch of a step."""
    p = config.teacher
    mean, std = jnp.asarray(p.mean), jnp.asarray(p.std)

    def draw(key: jax.Array) -> game.Batch:
        latents, labels = draw_inputs(key, batch_size, p.num_classes)
        if not config.game.framed_weight:
            return game.Batch(latents, labels)
        frames = framing.draw_frames(
            jax.random.fold_in(key, _FRAMES_STREAM),
            batch_size,
            tuple(p.image_shape),
            black=-mean / std,
            white=(1 - mean) / std,
        )
        return game.Batch(latents, labels, frames)

    return draw


def game_parts(
    config: ConfigDict, axis_name: str | None = None, values: Values | None = None
) -> GameParts:
    """Networks, losses and optimizers of a configuration.

    Args:
      config: see `config.default_config`.
      axis_name: mapped axis over which the global batch is split, or None.
      values: to play with; the configuration's by default.
    """
    p, g = config.teacher, config.game
    values = game_values(config) if values is None else values
    generator, student = _modules(config, axis_name)
    p_model = models.get_model(p.model, num_classes=p.num_classes)
    rate = functools.partial(optim.between_drops, drops=tuple(g.rate_drops))
    recipe = recipes.get(config.recipe)
    settings = {**recipe.settings, **g.to_dict(), **values.settings}
    decays = (lambda path: path[0].key == "params") if g.q_decay_norms else is_kernel
    return GameParts(
        networks=game.Networks(
            _compute_in(config.compute_dtype, generator.apply),
            _compute_in(config.compute_dtype, p_model.apply),
            student.apply,
        ),
        generator_loss=recipes.make_loss(recipe.generator, settings, values.g_weights),
        student_loss=recipes.make_loss(recipe.student, settings, values.q_weights),
        g_optimizer=optim.generator_optimizer(rate(values.g_rates)),
        q_optimizer=optim.student_optimizer(
            rate(values.q_rates), g.q_weight_decay, decays=decays
        ),
        q_options=game.QOptions(
            config.quant.weight_bits,
            config.quant.weight_range,
            config.quant.range_ema,
            config.quant.learn_ranges,
            g.q_average,
            layer_bits(network_info(config)),
            g.framed_weight,
        ),
    )


@functools.partial(jax.jit, static_argnums=0)
def _init(module: Any, key: jax.Array, *inputs: jax.Array) -> Any:
    """A module's variables; compiled once for all modules that are equal."""
    return module.init(key, *inputs)


def initial_state(
    config: ConfigDict, parts: GameParts, p_variables: Any, draw: Callable[..., Any]
) -> GameState:
    """The state before step 0."""
    # Without the mapped axis: the modules sync over it in training only.
    generator, student = _modules(config)
    key = jax.random.key(config.seed)
    # No variable depends on the values of the inputs.
    batch = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(draw, key)
    )
    g_variables = _init(generator, key, batch.latents, batch.labels)
    image = np.zeros((1, *config.teacher.image_shape), np.float32)
    # Only the ranges leave the compiled function, so that no kernel is drawn in it.
    ranges = jax.jit(lambda: student.init(key, image)["ranges"])()
    return game.init_state(
        g_variables=g_variables,
        q_init={"params": p_variables["params"], "ranges": ranges},
        g_optimizer=parts.g_optimizer,
        q_optimizer=parts.q_optimizer,
        q_options=parts.q_options,
    )


def final_batch_stats(config: ConfigDict, state: GameState, p_variables: Any) -> Any:
    """Running statistics that Q ends with: P's, or its own on images of G.

    With config.quant.reestimate_steps they are the moving average (momentum 0.9) of
    Q's batch statistics over so many batches, from P's on.
    """
    batch_stats = p_variables["batch_stats"]
    steps = config.quant.reestimate_steps
    if not steps:
        return batch_stats
    parts, (generator, student) = game_parts(config), _modules(config)
    draw = make_draw(config, config.game.batch_size)
    key = jax.random.fold_in(jax.random.key(config.seed), _REESTIMATION_STREAM)
    state = jax.device_put(state)

    @jax.jit
    def move(state, batch_stats, step):
        batch = draw(jax.random.fold_in(key, step))
        g_variables = {"params": state.g_params, "batch_stats": state.g_batch_stats}
        images, _ = generator.apply(
            g_variables, batch.latents, batch.labels, mutable=["batch_stats"]
        )
        q_variables = game.q_variables(state, p_variables, parts.q_options)
        _, moved = student.apply(
            {**q_variables, "batch_stats": batch_stats}, images, mutable=["batch_stats"]
        )
        return moved["batch_stats"]

    for step in range(steps):
        batch_stats = move(state, batch_stats, step)
    return sharding.fetch(batch_stats)


def build_game(
    config: ConfigDict, p_variables: Any, devices: Sequence[jax.Device], batch_size: int
) -> tuple[Steps, GameState]:
    """Compiled steps (at their first use), and the state before step 0.

    Args:
      config: see `config.default_config`.
      p_variables: P's variables.
      devices: that take part.
      batch_size: of the global batch.
    """
    axis = sharding.AXIS
    parts = game_parts(config, axis)
    draw = make_draw(config, batch_size)
    play = game.make_play(**parts._asdict(), axis_name=axis)
    step = rollout.make_game_step(play, draw=draw, axis_name=axis)

    @functools.cache
    def steps(phase: Phase, count: int):
        played = functools.partial(rollout.make_rollout(step, count), phase=phase)
        return sharding.parallel_step(played, devices)

    state = initial_state(config, parts, p_variables, draw)
    return steps, sharding.replicate(state, devices)


def digest(variables: Any) -> str:
    """SHA-256 of variables by name and value, whichever file they came from."""
    total = hashlib.sha256()
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    for name in sorted(flat):
        array = np.ascontiguousarray(flat[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def identity(config: ConfigDict, p_variables: Any, batch_size: int) -> dict[str, Any]:
    """Everything that changes the numbers of a game, as JSON values by key."""
    values = game_values(config)
    return {
        **base.identity(config),
        "game.batch_size": batch_size,
        # What a recipe from outside the package may have changed under its name.
        "recipe.settings": json.loads(json.dumps(recipes.get(config.recipe).settings)),
        "recipe.weights": {**values.g_weights, **values.q_weights},
        "teacher.sha256": digest(p_variables),
    }
