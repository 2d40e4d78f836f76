"""The library calls: tracing and quantizing a network of your own."""

import contextlib
import dataclasses
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.core
import flax.traverse_util
import jax
import numpy as np

from adadfq_jax import recipes, teacher
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import QuantizedNetwork
from adadfq_jax.errors import InputError, short
from adadfq_jax.network import Function, Graph, as_function
from adadfq_jax.network import trace as trace_function
from adadfq_jax.recipes import Recipe
from adadfq_jax.runtime import remote, sharding
from adadfq_jax.runtime.progress import Progress, say, show_by_default
from adadfq_jax.runtime.run_files import QUANTIZED_FILE
from adadfq_jax.settings import ROWS, refuse_name
from adadfq_jax.teacher import LoadedNetwork
from adadfq_jax.training import budget, build, loop, run
from adadfq_jax.training.callbacks import At
from adadfq_jax.training.reconstruct import (
    check_batch,
    check_memory,
    make_reconstruction,
)
from adadfq_jax.training.spec import RunSpec, resolve


def trace(
    network: Any,
    variables: Any = None,
    *,
    image_shape: Sequence[int] | None = None,
    layout: str = "NHWC",
) -> Graph:
    """Find what can be quantized in a network, and where.

    The network needs no code for quantization: convolutions, products, nonlinearities
    and batch norms are found in its jaxpr. `print` shows the graph as a table.

    Args:
      network: a function (variables, images) -> logits, a Linen module, an NNX module
        (traced in inference), any pytree whose call takes a batch of images, or the
        result of `load_network`.
      variables: of a function or a Linen module, as arrays or their shapes.
      image_shape: (H, W, channels), whatever the layout; a loaded network has it.
      layout: of the images that the network takes, 'NHWC' or 'NCHW'.

    Returns:
      The graph, with `kernels`, `activations`, `batch_norms` and `blocks`.

    Raises:
      adadfq_jax.errors.InputError: the network cannot be applied or cannot be
        quantized; the message says why.
    """
    function, shape = _given(network, variables, image_shape)
    return _traced(function, shape, layout)


def quantize(
    network: Any,
    variables: Any = None,
    *,
    image_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    weight_bits: int = 4,
    act_bits: int = 4,
    layer_bits: str = "",
    recipe: str | Recipe = "best",
    steps: int | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "NHWC",
    settings: Mapping[str, Any] | None = None,
    name: str = "",
) -> QuantizedNetwork:
    """Quantize a network of your own: take P, return Q.

    The network needs no code for quantization. Every kernel of a convolution or product
    is quantized, and so is its input where a nonlinearity comes before it, as `trace`
    shows. Progress is logged by the logger `adadfq_jax`, and printed where the program
    has not set up logging. The next call with the same workdir resumes a run that was
    interrupted.

    Args:
      network: P, trained, in inference: a function (variables, images) -> logits [B,
        classes], a Linen module, an NNX module, any pytree whose call takes a batch of
        images, or the result of `load_network`.
      variables: of a function or a Linen module: a tree of arrays.
      image_shape: (H, W, channels), whatever the layout; a loaded network has it.
      num_classes: length of the logits; None means the length that the network gives.
      weight_bits: of kernels, 2 to 8.
      act_bits: of activations, 2 to 8.
      layer_bits: bits of single layers, as in 'output=w8a8,stage1_.*=w4a8': regular
        expressions that match whole names of layers, as `trace` shows them, with or
        without a last '.kernel' or '.weight'; the last match decides.
      recipe: the losses and their settings: a name, or a `recipes.Recipe` of your own.
      steps: of the game; None means the recipe's number. The rest of the recipe's
        schedule (observing, warm-up, drops of the rates) is scaled with it, but a
        reconstruction is not. 0 selects the recipe 'calibrate', which does not train Q.
      seed: of all random draws.
      workdir: folder for the run's files: quantized.safetensors, metrics.jsonl,
        checkpoints. With None, no file is written.
      mean: per channel, of P's normalisation (pixels / 255 - mean) / std; by default
        that of a loaded network, if it is known. It is stored with Q and defines black
        and white in the frames of `game.framed_weight` and `reconstruction.framed`;
        generated images have mean 0 and variance 1 per channel.
      std: see `mean`; give both or neither.
      layout: of the images that the network takes, 'NHWC' or 'NCHW'; Q takes NHWC.
      settings: settings that are no argument here, as {'game.q_rate': 3e-4}; see
        `settings.Settings`.
      name: of the network in files; '' means the name of the function or class.

    Returns:
      Q, a function of normalised images. Its attributes are `variables`, `kernels`
      (codes), `ranges`, `info`, `graph` and, with a workdir, `path`, its file.
      `save(path)` writes a file that `adadfq_jax.load_quantized(path, network)` reads;
      `export(folder)` writes ONNX and StableHLO files.

    Raises:
      adadfq_jax.errors.InputError: an argument cannot be used.
      adadfq_jax.errors.NumericalError: the game reached a number that is not finite.
    """
    given, shape = _given(network, variables, image_shape)
    if isinstance(network, LoadedNetwork) and mean is None and std is None:
        mean, std = network.mean or None, network.std or None
    _check_types(
        ("recipe", recipe, (str, Recipe), "a name of adadfq_jax.recipes or a Recipe"),
        ("name", name, str, "a text"),
        ("layer_bits", layer_bits, str, "a text"),
        ("workdir", workdir, (str, os.PathLike, type(None)), "a path, or None"),
        ("settings", settings, (Mapping, type(None)), "{'game.q_rate': 3e-4}, or None"),
        *(("settings", key, str, "values by name") for key in settings or ()),
    )
    _check_settings(settings or (), steps)
    own_recipe = recipe if isinstance(recipe, Recipe) else None
    values = {
        "recipe": OWN_RECIPE if own_recipe else recipe,
        "teacher.model": name or _name_of(network),
        "teacher.image_shape": shape,
        "teacher.mean": _per_channel("mean", mean, 0.0, shape[2]),
        "teacher.std": _per_channel("std", std, 1.0, shape[2]),
        "teacher.layout": layout,
        "quant.weight_bits": _whole_number("weight_bits", weight_bits),
        "quant.act_bits": _whole_number("act_bits", act_bits),
        "quant.layer_bits": layer_bits,
        "seed": _whole_number("seed", seed),
        "checkpoint.every": 0 if workdir is None else 200,
        **dict.fromkeys(_SWITCHED_OFF, False),
    }
    if (mean is None) != (std is None):
        pair = "std without mean" if mean is None else "mean without std"
        raise InputError(f"{pair}: give both, or neither")
    if steps == 0:
        values["game.steps"] = 0
    elif steps is not None:
        played = own_recipe or recipes.get(str(recipe))
        decided = played.at(_whole_number("weight_bits", weight_bits)).settings
        values |= _scaled_schedule(decided, _whole_number("steps", steps))
    graph = _traced(given, shape, layout)
    function = _checked(given, graph)
    try:
        if function.of_shapes() != given.of_shapes():
            _traced(function, shape, layout)
    except InputError as error:
        raise InputError(
            "variables: they are converted to float32, but this network does not accept"
            f" float32; let the network itself convert them to its types ({error})"
        ) from error
    classes = graph.num_classes if num_classes is None else num_classes
    values["teacher.num_classes"] = _whole_number("num_classes", classes)
    spec = _spec({**values, **(settings or {})}, own_recipe)
    show_by_default()
    if workdir is None:
        return _quantize_in_memory(spec, function)
    from adadfq_jax.jobs import train  # here: only a workdir needs it

    with _arguments_in_messages():
        command = "adadfq_jax.quantize(...)"
        train.run(spec, workdir, command=command, function=function)
    with remote.opened(workdir) as place:
        file = place.folder / QUANTIZED_FILE
        found = quantized_file.load_quantized(file, function)
    # The local copy of shared storage is gone.
    return dataclasses.replace(found, path=None) if remote.is_remote(workdir) else found


OWN_RECIPE = "own"  # name in files for a recipe from outside the package


def _given(
    network: Any, variables: Any, image_shape: Sequence[int] | None
) -> tuple[Function, tuple[int, ...]]:
    """Return the network that a user gives as a function, and the shape of an image."""
    if isinstance(network, LoadedNetwork):
        own = network.image_shape if image_shape is None else image_shape
        return as_function(network.function, variables), _shape(own)
    return as_function(network, variables), _shape(image_shape)


def _name_of(network: Any) -> str:
    """Return the name of a network in files, for a user who gives none."""
    if isinstance(network, LoadedNetwork):
        return network.name
    name = getattr(network, "__name__", type(network).__name__)
    return "network" if name in ("<lambda>", "Function", "partial") else name


def _quantize_in_memory(spec: RunSpec, function: Function) -> QuantizedNetwork:
    """Train Q without writing files."""
    devices, batch_size = sharding.choose_devices(
        spec.devices, spec.game.batch_size, spec.game.batch_rule
    )
    check_batch(spec, devices)
    with jax.default_matmul_precision(spec.matmul_precision):
        bits = None
        if spec.quant.budget:
            bits = budget.choose(spec, batch_size, function)
        assembly = build.assemble(spec, batch_size, function, bits)
        check_memory(assembly, devices)
        for note in build.notes(assembly):
            say(note)
        steps, state = build.build_game(assembly, function.variables, devices)
        teacher = assembly.teacher(function.variables)
        teacher = sharding.replicate(teacher, devices)
        key = sharding.replicate(jax.random.key(spec.seed), devices)
        count = sharding.steps_per_dispatch(spec.steps_per_dispatch, devices)
        phase = make_reconstruction(assembly, devices)
        total = spec.game.steps if phase is None else phase.steps
        progress = Progress(total, game=spec.game.steps)
        pauses = range(spec.log.every, total + 1, spec.log.every)
        callbacks, each = [At(pauses, progress.show)], min(count, spec.log.every)
        ended: Any
        try:
            ended, _ = loop.fit(
                *(steps, state, (teacher, key), spec.game),
                per_dispatch=each,
                callbacks=callbacks,
            )
            if phase is not None:
                ended, _ = phase.fit(
                    *(ended, teacher, spec.seed),
                    per_dispatch=each,
                    callbacks=callbacks,
                )
        finally:
            progress.close()
        return run.freeze(assembly, ended, teacher, phase)


def _traced(function: Function, shape: tuple[int, ...], layout: str) -> Graph:
    return trace_function(
        function.apply,
        function.variables,
        image_shape=shape,
        layout=layout,
        parameters=function.parameters,
    )


def _refused(name: str, value: Any, must_be: str) -> InputError:
    return InputError(f"{name}={short(repr(value))}: must be {must_be}")


def _check_types(*arguments: tuple[str, Any, Any, str]) -> None:
    """Refuse an argument (name, value, allowed types, must_be) of another type."""
    for name, value, types, must_be in arguments:
        if not isinstance(value, types):
            raise _refused(name, value, must_be)


def _whole_number(name: str, value: Any) -> int:
    """Convert a whole number of Python or numpy to Python's int."""
    try:
        return operator.index(value)
    except TypeError:
        raise _refused(name, value, "a whole number") from None


def _shape(value: Any) -> tuple[int, ...]:
    try:
        shape = tuple(map(operator.index, value))
    except TypeError:
        shape = ()
    if len(shape) != 3:
        raise _refused("image_shape", value, "(height, width, channels)")
    return shape


def _per_channel(
    name: str, values: Any, default: float, channels: int
) -> tuple[float, ...]:
    """Check finite numbers, one per channel; None means `default` for all channels."""
    if values is None:
        return (default,) * channels
    try:
        numbers = () if isinstance(values, str) else tuple(map(float, values))
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != channels or not np.all(np.isfinite(numbers)):
        raise _refused(name, values, f"{channels} numbers, one per channel, or None")
    return numbers


# A library call neither evaluates nor exports nor reports.
_SWITCHED_OFF = ("eval.enabled", "export.onnx", "export.stablehlo", "report.enabled")
# Settings that are arguments of `quantize`.
_ARGUMENTS = {
    "recipe": "recipe",
    "seed": "seed",
    "teacher.model": "name",
    "teacher.image_shape": "image_shape",
    "teacher.num_classes": "num_classes",
    "teacher.mean": "mean",
    "teacher.std": "std",
    "teacher.layout": "layout",
    "quant.weight_bits": "weight_bits",
    "quant.act_bits": "act_bits",
    "quant.layer_bits": "layer_bits",
    "game.steps": "steps",
}


def _check_settings(names: Iterable[str], steps: int | None) -> None:
    """Refuse names that are no setting, and settings that are arguments."""
    for name in names:
        if name not in ROWS:
            refuse_name(name)
        # Unlike the argument `steps`, `game.steps` does not scale the schedule.
        if name in _ARGUMENTS and (name != "game.steps" or steps is not None):
            raise InputError(f"settings: {name!r} is the argument {_ARGUMENTS[name]}")


def _scaled_schedule(decided: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Scale a recipe's schedule to another number of steps.

    Raises:
      InputError: the recipe has no schedule that could be scaled.
    """
    schedule = ("steps", "observe_steps", "warmup_steps", "rate_drops")
    missing = [key for key in schedule if key not in decided]
    if missing or decided["steps"] == 0:
        raise InputError(
            f"steps={steps}: the recipe has no {missing[0] if missing else 'steps'} to"
            " scale; make your recipe from another one with `adding`, as in"
            " recipes.get('adadfq').adding(...)"
        )
    share = steps / decided["steps"]
    observe, warmup = (
        max(1, round(share * decided[key])) for key in ("observe_steps", "warmup_steps")
    )
    return {
        "game.steps": steps,
        "game.observe_steps": observe,
        "game.warmup_steps": warmup,
        "game.rate_drops": tuple(round(share * step) for step in decided["rate_drops"]),
    }


def _spec(values: Mapping[str, Any], recipe: Recipe | None) -> RunSpec:
    """Resolve settings by name to a spec."""
    with _arguments_in_messages():
        return resolve(flax.traverse_util.unflatten_dict(dict(values), sep="."), recipe)


@contextlib.contextmanager
def _arguments_in_messages() -> Iterator[None]:
    """Replace settings in errors by the arguments of `quantize` that set them.

    Raises:
      InputError: the error of the body, with names of arguments.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
        for name, argument in _ARGUMENTS.items():
            message = message.replace(name, argument)
        raise InputError(message) from error


def _checked(function: Function, graph: Graph) -> Function:
    """Convert the variables to numpy arrays, floating-point ones to float32.

    Raises:
      InputError: a variable that the logits need is no array of finite numbers.
    """
    arrays = dict(function.variables)
    variances = {norm.variables[1] for norm in graph.batch_norms}
    for name in graph.needed:
        leaf = arrays[name]
        try:
            array = np.asarray(leaf)
            is_float = jax.dtypes.issubdtype(array.dtype, np.floating)
            kind = np.float32 if is_float else array.dtype
            array = array.astype(jax.dtypes.canonicalize_dtype(kind))
        except (TypeError, ValueError, OverflowError):
            array = np.asarray(None)
        if array.dtype == object or array.dtype.kind in "USMm":
            what = f"{name} is {short(repr(leaf))}, no array of numbers"
            raise InputError(f"variables: {what}")
        if wrong := teacher.defect_of(name, array, name in variances):
            raise InputError(f"variables: {wrong}")
        arrays[name] = array
    return function._replace(variables=arrays)
