"""Building a run from its spec: networks, losses, optimizers and compiled steps."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import game, models, optim, recipes, settings, teacher
from adadfq_jax.deploy.network import NetworkInfo, function_of, graph_of
from adadfq_jax.errors import InputError
from adadfq_jax.game import (
    GameState,
    Phase,
    framing,
    layer_bits,
    players,
    rollout,
)
from adadfq_jax.losses import Loss
from adadfq_jax.models.generator import draw_inputs, get_generator
from adadfq_jax.network import Function, Graph
from adadfq_jax.runtime import sharding
from adadfq_jax.training import spec as specs
from adadfq_jax.training.spec import RunSpec

# Folded into a step's key to draw frames; its splits 0 and 1 give latents and labels.
_FRAMES_STREAM = 2

# (phase, steps in a dispatch) -> the compiled function that takes these steps.
Steps = Callable[[Phase, int], Callable[..., tuple[GameState, dict[str, jax.Array]]]]


def network_info(spec: RunSpec) -> NetworkInfo:
    """Return the description of Q that the exported file holds."""
    p = spec.teacher
    return NetworkInfo(
        model=p.model,
        num_classes=p.num_classes,
        image_shape=p.image_shape,
        mean=p.mean,
        std=p.std,
        weight_bits=spec.quant.weight_bits,
        act_bits=spec.quant.act_bits,
        first_last_bits=spec.quant.first_last_bits,
        places=spec.quant.places,
        layout=p.layout,
    )


class Loaded(NamedTuple):
    """P as read from its file.

    Attributes:
      function: P's network with its variables.
      spec: the spec; its `teacher.model` names the network.
      note: a sentence that says which network was recognised and what was left out of
        the file, or ''.
    """

    function: Function
    spec: RunSpec
    note: str


def load_teacher(spec: RunSpec) -> Loaded:
    """Read P from its file, and check it against the settings of the spec.

    Settings that are left to the file are entered into the spec, and the note names
    what was found: where `teacher.model` is '', the network; where `num_classes` is 0
    or `image_shape`, `mean` and `std` are (), these. The note also names what was left
    out of the file.

    Raises:
      InputError: the file cannot be used, or holds another network.
    """
    p = spec.teacher
    if not p.path:
        if p.model:
            models.get_model(p.model, num_classes=2)  # refuses an unknown name
        raise InputError("teacher.path='': it must name P's file", "teacher.path")
    found = teacher.load_network(
        p.path, p.model, p.batch_norms, key=p.key, image_shape=p.image_shape or None
    )
    function, shape = found.function, p.image_shape or found.image_shape
    notes = list(found.notes)
    if not p.model:
        naming = f" in {found.naming} naming" if found.naming else f": {found.kind}"
        notes.insert(0, f"{found.name}{naming}")
    _require_fit(spec, found)
    wrong = found.defect()
    if wrong:
        raise InputError(f"{p.path}: {wrong}")
    values = {
        "teacher.model": p.model or found.name,
        "teacher.num_classes": p.num_classes or found.num_classes,
        "teacher.image_shape": shape,
    }
    if found.address:
        values["teacher.path"] = found.address  # with its commit
    if not p.mean:
        mean, std = found.mean, found.std
        if not mean:
            mean, std = usual_normalisation(found.name, shape[2])
        values |= {"teacher.mean": mean, "teacher.std": std}
    if not (p.mean and p.image_shape and p.num_classes):
        own = [
            f"{name}={value}"
            for name, value in values.items()
            if name not in ("teacher.model", "teacher.path")
        ]
        notes.append(", ".join(own))
    note = f"{found.address or p.path}: {'; '.join(notes)}" if notes else ""
    return Loaded(function, spec.replace(values), note)


def usual_normalisation(
    model: str, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std that a network's images are normalised with most.

    They are those of ImageNet, TensorFlow's own for its EfficientNets, and 0.5 and 0.25
    for other than three channels.
    """
    if channels == 3 and model.startswith("tf_efficientnet"):
        return (127 / 255,) * 3, (128 / 255,) * 3
    if channels == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5,) * channels, (0.25,) * channels


def _require_fit(spec: RunSpec, found: teacher.LoadedNetwork) -> None:
    """Refuse settings that are not those of the file."""
    p = spec.teacher
    if p.layout != "NHWC" and not found.naming:
        raise InputError(
            f"teacher.layout={p.layout!r}: an ONNX file tells its layout; leave this"
            " out",
            "teacher.layout",
        )
    if p.num_classes not in (0, found.num_classes):
        raise InputError(
            f"{p.path}: teacher.num_classes={p.num_classes}, but the network has"
            f" {found.num_classes} classes",
            "teacher.num_classes",
        )


def _compute_in(dtype: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """Make `apply` cast its input to `dtype`, in which its layers then compute.

    Parameters and statistics stay float32, and the outputs are cast to float32.
    """
    if dtype == "float32":
        return apply

    def cast_inputs(variables, x, *others, **kwargs):
        out = apply(variables, x.astype(dtype), *others, **kwargs)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out)

    return cast_inputs


class Values(NamedTuple):
    """The numbers in which games that share a compiled program may differ.

    They may be traced values.

    Attributes:
      settings: settings of the losses, by name.
      g_weights: weights of the terms of G's loss, by name.
      q_weights: weights of the terms of Q's loss, by name.
      g_rates: G's learning rates between the drops, [drops + 1].
      q_rates: Q's learning rates between the drops, [drops + 1].
    """

    settings: dict[str, Any]
    g_weights: dict[str, Any]
    q_weights: dict[str, Any]
    g_rates: Any
    q_rates: Any


def _loss_settings(spec: RunSpec) -> dict[str, Any]:
    """Return the settings that the losses read: the recipe's own, and `game.*`."""
    game_settings = {
        name.removeprefix("game."): settings.get(spec, name)
        for name in settings.ROWS
        if name.startswith("game.")
    }
    return {**spec.losses.settings, **game_settings}


def game_values(spec: RunSpec) -> Values:
    """Return the numbers of a spec as they are written, not rounded to float32."""
    g, own = spec.game, _loss_settings(spec)
    drops, factor = len(g.rate_drops), g.rate_drop_factor
    return Values(
        settings={key: own[key] for key in settings.LOSS_SETTINGS},
        g_weights=dict(recipes.weigh(spec.losses.generator, own)),
        q_weights=dict(recipes.weigh(spec.losses.student, own)),
        g_rates=optim.decayed(g.g_rate, drops, factor),
        q_rates=optim.decayed(g.q_rate, drops, factor),
    )


class GameParts(NamedTuple):
    """The parts of a game: the arguments of `game.make_play`."""

    networks: game.Networks
    generator_loss: Loss
    student_loss: Loss
    g_optimizer: optim.Optimizer
    q_optimizer: optim.Optimizer
    q_options: game.QOptions
    views: Sequence[game.ViewLoss] = ()


def _make_generator(spec: RunSpec, axis_name: str | None = None) -> nn.Module:
    p = spec.teacher
    return get_generator(
        spec.game.generator,
        num_classes=p.num_classes,
        image_shape=p.image_shape,
        axis_name=axis_name,
        channels=spec.game.generator_channels,
    )


def make_frames(
    spec: RunSpec, batch_size: int
) -> Callable[[jax.Array], framing.Frames]:
    """Make the function key -> frames for a batch.

    Black and white are the pixel values 0 and 1 in P's normalised space.
    """
    p = spec.teacher
    mean, std = jnp.asarray(p.mean), jnp.asarray(p.std)

    def draw(key: jax.Array) -> framing.Frames:
        black, white = -mean / std, (1 - mean) / std
        return framing.draw_frames(
            key, batch_size, p.image_shape, black=black, white=white
        )

    return draw


def make_draw(spec: RunSpec, batch_size: int) -> Callable[[jax.Array], game.Batch]:
    """Make the function key -> the random inputs of a step, for the global batch."""
    p, framed = spec.teacher, bool(spec.game.framed_weight)
    draw_frames = make_frames(spec, batch_size)

    def draw(key: jax.Array) -> game.Batch:
        latents, labels = draw_inputs(key, batch_size, p.num_classes)
        if not framed:
            return game.Batch(latents, labels)
        frames = draw_frames(jax.random.fold_in(key, _FRAMES_STREAM))
        return game.Batch(latents, labels, frames)

    return draw


def _make_parts(
    spec: RunSpec,
    networks: game.Networks,
    q_options: game.QOptions,
    values: Values,
    axis_name: str | None = None,
) -> GameParts:
    g = spec.game
    rate = functools.partial(optim.between_drops, drops=g.rate_drops)
    own = {**_loss_settings(spec), **values.settings}
    student_loss = recipes.make_loss(spec.losses.student, own, values.q_weights)
    views = []
    if g.framed_weight:
        views = [recipes.framed_view(student_loss, g.framed_weight, axis_name)]

    return GameParts(
        networks=networks,
        generator_loss=recipes.make_loss(spec.losses.generator, own, values.g_weights),
        student_loss=student_loss,
        g_optimizer=optim.generator_optimizer(rate(values.g_rates)),
        q_optimizer=optim.student_optimizer(rate(values.q_rates), g.q_weight_decay),
        q_options=q_options,
        views=views,
    )


class Assembly(NamedTuple):
    """The parts of a run, made once from its spec.

    Attributes:
      spec: the settings of the run.
      batch_size: size of the global batch.
      info: the description of Q for the exported file.
      function: the network that is quantized, with shapes in place of variables.
      graph: the traced network.
      generator: G for a batch on a single device.
      values: the numbers of the spec.
      parts: the parts of the game for a batch on a single device.
      draw: draws the inputs of a step, see `make_draw`.
      notes: sentences for the user on the bits of layers.
    """

    spec: RunSpec
    batch_size: int
    info: NetworkInfo
    function: Function
    graph: Graph
    generator: nn.Module
    values: Values
    parts: GameParts
    draw: Callable[[jax.Array], game.Batch]
    notes: tuple[str, ...] = ()

    def parts_with(
        self, *, values: Values | None = None, axis_name: str | None = None
    ) -> GameParts:
        """Return the parts with other numbers, or for a batch split over an axis.

        Args:
          values: the numbers to use; None takes those of the spec.
          axis_name: mapped axis of the global batch, or None.
        """
        values = self.values if values is None else values
        networks = self.parts.networks
        if axis_name is not None:
            generator = _make_generator(self.spec, axis_name)
            apply = _compute_in(self.spec.compute_dtype, generator.apply)
            networks = networks._replace(g_apply=apply)
        options = self.parts.q_options
        return _make_parts(self.spec, networks, options, values, axis_name)

    def teacher(self, p_variables: Mapping[str, Any]) -> game.Teacher:
        """Return P as the step takes it."""
        needed = {name: p_variables[name] for name in self.graph.needed}
        return game.with_clip_ratios(self.graph, needed, self.parts.q_options)

    def identity(self, p_variables: Any) -> dict[str, Any]:
        """Return all values that determine the run's numbers, see `spec.identity`."""
        return specs.identity(
            self.spec,
            batch_size=self.batch_size,
            weights={**self.values.g_weights, **self.values.q_weights},
            p_digest=digest({name: p_variables[name] for name in self.graph.needed}),
        )


def assemble(
    spec: RunSpec,
    batch_size: int,
    function: Function | None = None,
    bits: Mapping[str, int] | None = None,
) -> Assembly:
    """Build the networks, losses and optimizers of a run.

    Args:
      spec: the settings of the run.
      batch_size: size of the global batch.
      function: the network; None takes the package's network that the spec names.
      bits: bits of the kernels and activations that have others, by name; None takes
        those of `quant.layer_bits`.

    Raises:
      InputError: the network cannot be quantized, or `quant.layer_bits` names no layer.
    """
    info, values, quantized = network_info(spec), game_values(spec), spec.quant
    function = function or function_of(info)
    graph = graph_of(info, function)
    found = layer_bits.resolve(
        graph,
        *(quantized.weight_bits, quantized.act_bits, quantized.first_last_bits),
        settings.layer_rules(quantized.layer_bits),
    )
    if bits is not None or quantized.layer_bits:
        info = info.mixed(found.bits if bits is None else bits)
    generator, dtype = _make_generator(spec), spec.compute_dtype
    p_graph = graph if dtype == "float32" else graph_of(info, function, dtype)
    networks = game.Networks(_compute_in(dtype, generator.apply), p_graph, graph)
    options = info.options(
        graph,
        weight_range=quantized.weight_range,
        act_range=quantized.act_range,
        range_ema=quantized.range_ema,
        mask_gradient=quantized.mask_gradient,
        symmetric=quantized.symmetric,
        average=spec.game.q_average,
    )
    return Assembly(
        spec,
        batch_size,
        info,
        function.of_shapes(),
        graph,
        generator,
        values,
        _make_parts(spec, networks, options, values),
        make_draw(spec, batch_size),
        tuple(found.notes if bits is None else ()),
    )


def notes(assembly: Assembly) -> list[str]:
    """Return the notes and warnings on the network to print before training."""
    found = [*assembly.graph.notes, *assembly.notes]
    if assembly.info.layer_bits:
        other = assembly.info.bits_in_words(assembly.graph)
        found.append(f"bits per layer: {other}; the others as usual")
    if not assembly.graph.batch_norms:
        terms = [name for name in assembly.spec.losses.generator if name != "bn_stats"]
        found.append(
            "WARNING: the network has no batch norm, so that G learns from"
            f" {', '.join(terms)} alone"
        )
    return found


@functools.partial(jax.jit, static_argnums=0)
def _init(module: Any, key: jax.Array, *inputs: jax.Array) -> Any:
    """Initialise a module's variables; modules that are equal share one compilation."""
    return module.init(key, *inputs)


def initial_state(assembly: Assembly, p_variables: Any) -> GameState:
    """Return the state of the game before step 0."""
    spec, parts = assembly.spec, assembly.parts
    key = jax.random.key(spec.seed)
    # No variable depends on the values of the inputs.
    batch = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(assembly.draw, key),
    )
    g_variables = _init(assembly.generator, key, batch.latents, batch.labels)
    graph = assembly.graph
    return game.init_state(
        g_variables=g_variables,
        q_params={name: p_variables[name] for name in graph.parameters},
        q_ranges=players.init_ranges(graph),
        g_optimizer=parts.g_optimizer,
        q_optimizer=parts.q_optimizer,
        q_options=parts.q_options,
    )


# What the steps of recent runs depend on, and these steps.
_recent_steps: collections.deque[tuple[Any, Steps]] = collections.deque(maxlen=4)


def compile_steps(assembly: Assembly, devices: Sequence[jax.Device]) -> Steps:
    """Return the steps with the batch split over devices; first use compiles them.

    Runs of the same game in one process, such as those of other seeds, share them.
    """
    spec, parts, schedule = assembly.spec, assembly.parts, assembly.spec.game
    if spec.recipe in recipes.names():
        # The loop reads the schedule of the phases, the step does not. Terms of the
        # user's own may.
        schedule = dataclasses.replace(
            schedule, steps=0, observe_steps=0, warmup_steps=0
        )
    depends_on = (
        *(list(devices), assembly.batch_size, assembly.graph, parts.networks.p),
        *(parts.q_options, spec.losses, spec.compute_dtype),
        *(schedule, dataclasses.replace(spec.teacher, path="")),
    )
    for known, steps in _recent_steps:
        if known == depends_on:
            return steps
    steps = _compile_steps(assembly, devices)
    _recent_steps.append((depends_on, steps))
    return steps


def _compile_steps(assembly: Assembly, devices: Sequence[jax.Device]) -> Steps:
    axis = sharding.AXIS
    play = game.make_play(
        **assembly.parts_with(axis_name=axis)._asdict(), axis_name=axis
    )
    step = rollout.make_game_step(play, draw=assembly.draw, axis_name=axis)

    @functools.cache
    def steps(phase: Phase, count: int):
        played = functools.partial(rollout.make_rollout(step, count), phase=phase)
        return sharding.parallel_step(played, devices)

    return steps


def build_game(
    assembly: Assembly, p_variables: Any, devices: Sequence[jax.Device]
) -> tuple[Steps, GameState]:
    """Return the compiled steps, and the state before step 0 replicated on devices."""
    state = initial_state(assembly, p_variables)
    return compile_steps(assembly, devices), sharding.replicate(state, devices)


def digest(variables: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the variables' names, types, shapes and values.

    It does not depend on the file that the variables came from.
    """
    total = hashlib.sha256()
    for name in sorted(variables):
        array = np.ascontiguousarray(variables[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()
