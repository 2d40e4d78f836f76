"""The library calls: tracing and quantizing a network of your own."""

import dataclasses
import functools
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from adadfq_jax import game, recipes
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import QuantizedNetwork
from adadfq_jax.errors import InputError, short
from adadfq_jax.models import layers
from adadfq_jax.network import Graph, as_function
from adadfq_jax.network import trace as trace_function
from adadfq_jax.recipes import Recipe
from adadfq_jax.runtime import remote, sharding
from adadfq_jax.runtime.progress import Progress
from adadfq_jax.runtime.run_files import QUANTIZED_FILE
from adadfq_jax.training import build, loop, run, schedule
from adadfq_jax.training.callbacks import At
from adadfq_jax.training.spec import RunSpec, resolve


def trace(
    network: Any,
    variables: Any = None,
    *,
    image_shape: Sequence[int],
    layout: str = "NHWC",
) -> Graph:
    """Finds what can be quantized in a network, and where.

    No module, yours or ours, needs to know of quantization: convolutions, products,
    nonlinearities and batch norms are found in the network's jaxpr. `print` shows the
    graph as a table. (`quantize` does not take every network that can be traced yet.)

    Args:
      network: a function (variables, images) -> logits, a Linen module, an NNX module
        (traced in inference), or any pytree whose call takes a batch of images.
      variables: of a function or a Linen module, arrays or their shapes.
      image_shape: (H, W, channels), whatever the layout.
      layout: of the images that the network takes, 'NHWC' or 'NCHW'.

    Returns:
      The graph, with `kernels`, `activations`, `batch_norms` and `blocks`.

    Raises:
      adadfq_jax.errors.InputError: the network cannot be applied, or cannot be
        quantized: it says why.
    """
    function = as_function(network, variables)
    return trace_function(
        function.apply,
        function.variables,
        image_shape=_shape(image_shape),
        layout=layout,
        parameters=function.parameters,
    )


def quantize(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    image_shape: Sequence[int],
    num_classes: int,
    weight_bits: int = 4,
    act_bits: int = 4,
    recipe: str | Recipe = "adadfq_tuned",
    steps: int | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str = "",
    settings: Mapping[str, Any] | None = None,
) -> QuantizedNetwork:
    """Quantizes a Linen module of your own: P is given, Q comes back.

    The module

    - has an attribute `act_quant`, `adadfq_jax.models.layers.Identity` by default, and
      calls `self.act_quant(name=...)(y)` after every activation function, where Q
      quantizes;
    - has `adadfq_jax.models.layers.BatchNorm` as its batch norms, whose variables are
      those of `flax.linen.BatchNorm`: the game needs P's running statistics;
    - takes images [B, H, W, C] alone, and gives logits [B, num_classes].

    Every parameter called 'kernel', output channel last, is quantized: those of
    `adadfq_jax.models.layers` (`Conv`, `Dense`, `ConvBlock`) and of `flax.linen`.

    Progress is printed. What is interrupted goes on at the next call with the same
    workdir.

    Args:
      model: P's network.
      variables: P's, {'params': ..., 'batch_stats': ...}, trained.
      image_shape: (H, W, channels), H and W multiples of 4.
      num_classes: length of the logits.
      weight_bits: of kernels, 2 to 8.
      act_bits: of activations, 2 to 8.
      recipe: the losses and their settings: a name, or a `recipes.Recipe` of your own.
      steps: of the game; None is the recipe's number. Its other steps (observing,
        warm-up, drops of the rates) move in proportion.
      seed: of every draw.
      workdir: folder that keeps the run: quantized.safetensors, metrics.jsonl,
        checkpoints. None writes nothing anywhere.
      mean: per channel, of P's normalisation (pixels / 255 - mean) / std. It is
        recorded, and says what is black and white in the frames of
        `game.framed_weight`; generated images have mean 0 and variance 1 per channel.
      std: see `mean`.
      name: of the network in files; '' is the name of the class.
      settings: others, as {'game.q_rate': 3e-4}; see `settings.Settings`.

    Returns:
      Q, a function of normalised images, with `variables`, `kernels` (codes),
      `ranges`, `info` and, with a workdir, `path`: its file. `save(path)` writes a
      file, which `adadfq_jax.load_quantized(path, model)` reads; `export(folder)`
      writes ONNX and StableHLO files.

    Raises:
      adadfq_jax.errors.InputError: an argument cannot be used.
      adadfq_jax.errors.NumericalError: the game reached a number that is not finite.
    """
    shape = _shape(image_shape)
    _check_types(
        ("recipe", recipe, (str, Recipe), "a name of adadfq_jax.recipes or a Recipe"),
        ("name", name, str, "a text"),
        ("workdir", workdir, (str, os.PathLike, type(None)), "a path, or None"),
        ("settings", settings, (Mapping, type(None)), "{'game.q_rate': 3e-4}, or None"),
        *(("settings", key, str, "values by name") for key in settings or ()),
    )
    own_recipe = recipe if isinstance(recipe, Recipe) else None
    values = {
        "recipe": OWN_RECIPE if own_recipe else recipe,
        "teacher.model": name or type(model).__name__,
        "teacher.image_shape": shape,
        "teacher.num_classes": _whole("num_classes", num_classes),
        "teacher.mean": _per_channel("mean", mean, 0.0, shape[2]),
        "teacher.std": _per_channel("std", std, 1.0, shape[2]),
        "quant.weight_bits": _whole("weight_bits", weight_bits),
        "quant.act_bits": _whole("act_bits", act_bits),
        "seed": _seed(seed),
        "checkpoint.every": 0 if workdir is None else 200,
        **dict.fromkeys(_BESIDE, False),
    }
    if steps is not None:
        decided = (own_recipe or recipes.get(str(recipe))).settings
        values |= _stretched(decided, _whole("steps", steps))
    spec = _spec({**values, **(settings or {})}, own_recipe)
    p_variables = _checked(model, variables, spec)
    if workdir is None:
        return _quantize_in_memory(spec, model, p_variables)
    from adadfq_jax.jobs import train  # a workdir is the command line's business

    train.run(
        spec,
        workdir,
        command="adadfq_jax.quantize(...)",
        model=model,
        p_variables=p_variables,
    )
    with remote.opened(workdir) as place:
        return quantized_file.load_quantized(place.folder / QUANTIZED_FILE, model)


OWN_RECIPE = "own"  # what a recipe from outside the package is called in files


def _quantize_in_memory(
    spec: RunSpec, model: nn.Module, p_variables: Any
) -> QuantizedNetwork:
    """Trains Q without a file."""
    devices, batch_size = sharding.choose_devices(
        spec.devices, spec.game.batch_size, spec.game.batch_rule
    )
    with jax.default_matmul_precision(spec.matmul_precision):
        assembly = build.assemble(spec, batch_size, model)
        steps, state = build.build_game(assembly, p_variables, devices)
        fixed = game.with_clip_ratios(p_variables, assembly.parts.q_options)
        fixed = sharding.replicate(fixed, devices)
        key = sharding.replicate(jax.random.key(spec.seed), devices)
        count = sharding.steps_per_dispatch(spec.steps_per_dispatch, devices)
        progress = Progress(spec.game.steps)
        try:
            state, _ = loop.fit(
                *(steps, state, (fixed, key), spec.game),
                per_dispatch=min(count, spec.log.every),
                callbacks=[At(schedule.pauses(spec), progress.show)],
            )
        finally:
            progress.close()
        return run.freeze(assembly, state, fixed)


def _refused(name: str, value: Any, must_be: str) -> InputError:
    return InputError(f"{name}={short(repr(value))}: must be {must_be}")


def _check_types(*arguments: tuple[str, Any, Any, str]) -> None:
    """Refuses arguments (name, value, types that it may be of, what it must be)."""
    for name, value, types, must_be in arguments:
        if not isinstance(value, types):
            raise _refused(name, value, must_be)


def _whole(name: str, value: Any) -> int:
    """A whole number, Python's or numpy's, as Python's."""
    try:
        return operator.index(value)
    except TypeError:
        raise _refused(name, value, "a whole number") from None


def _seed(value: Any) -> int:
    seed = _whole("seed", value)
    if not 0 <= seed < 2**32:  # of another no more than these bits would count
        raise _refused("seed", value, "0 to 2**32 - 1")
    return seed


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
    """Finite numbers, one per channel; None is `default` for all."""
    if values is None:
        return (default,) * channels
    try:
        numbers = () if isinstance(values, str) else tuple(map(float, values))
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != channels or not np.all(np.isfinite(numbers)):
        raise _refused(name, values, f"{channels} numbers, one per channel, or None")
    return numbers


# What a library call neither measures nor writes.
_BESIDE = ("eval.enabled", "export.onnx", "export.stablehlo", "report.enabled")
# Settings that are arguments of `quantize`.
_ARGUMENTS = {
    "teacher.image_shape": "image_shape",
    "teacher.num_classes": "num_classes",
    "teacher.mean": "mean",
    "teacher.std": "std",
    "quant.weight_bits": "weight_bits",
    "quant.act_bits": "act_bits",
    "game.steps": "steps",
}


def _stretched(decided: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A recipe's schedule stretched to so many steps."""
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
    """The spec of settings by name; errors name the arguments of `quantize`."""
    try:
        return resolve(flax.traverse_util.unflatten_dict(dict(values), sep="."), recipe)
    except InputError as error:
        told = str(error)
        for name, argument in _ARGUMENTS.items():
            told = told.replace(name, argument)
        raise InputError(told) from error


def _checked(
    model: nn.Module, variables: Mapping[str, Any], spec: RunSpec
) -> dict[str, Any]:
    """P's variables as float32 numpy arrays, where the game can be played with them.

    Raises:
      InputError: the module has not what `quantize` asks for, or the variables are
        not its own.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: {type(model).__name__} is no flax.linen.Module")
    kind = type(model).__name__
    if "act_quant" not in (field.name for field in dataclasses.fields(model)):
        raise InputError(
            f"model: {kind} has no attribute act_quant; give it `act_quant: Callable ="
            " adadfq_jax.models.layers.Identity` and call self.act_quant(name=...)(y)"
            " after every activation function"
        )
    image = jax.ShapeDtypeStruct((1, *spec.teacher.image_shape), np.float32)
    p_module = model.copy(act_quant=layers.Identity)
    q_module = model.copy(act_quant=functools.partial(layers.ActQuant, bits=8))
    try:
        expected = jax.eval_shape(q_module.init, jax.random.key(0), image)
        logits, inputs = jax.eval_shape(
            functools.partial(p_module.apply, mutable=["bn_inputs"]), expected, image
        )
    except Exception as error:  # whatever the module raises
        raise InputError(
            f"model: {kind} cannot be applied to one image of {image.shape[1:]} alone"
            f" ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
        ) from error
    found = {name: _flat(expected.get(name, {})) for name in expected}
    statistics = _flat(inputs.get("bn_inputs", {}))
    others = sorted(found.get("batch_stats", {}).keys() - statistics.keys())
    if "ranges" not in found:
        raise InputError(
            f"model: {kind} quantizes no activation; call self.act_quant(name=...)(y)"
            " after every activation function"
        )
    if not any(name.endswith("kernel") for name in found.get("params", {})):
        raise InputError(
            f"model: {kind} has no kernel to quantize; use the convolutions and dense"
            " layers of adadfq_jax.models.layers or flax.linen"
        )
    if not statistics or others:
        which = f" ({others[0].rpartition('.')[0]} is another)" if others else ""
        raise InputError(
            f"model: {kind} must have adadfq_jax.models.layers.BatchNorm as its batch"
            f" norms{which}: G learns from the statistics of their inputs"
        )
    if logits.shape != (1, spec.teacher.num_classes):
        raise InputError(
            f"num_classes={spec.teacher.num_classes}: {kind} gives {logits.shape} for"
            " one image"
        )
    return _fitting(variables, {k: found[k] for k in ("params", "batch_stats")}, kind)


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, joined by dots."""
    return flax.traverse_util.flatten_dict(flax.core.unfreeze(tree), sep=".")


def _fitting(
    variables: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]], kind: str
) -> dict[str, Any]:
    """Variables as float32 numpy arrays, if they are exactly those of the network."""
    if not isinstance(variables, Mapping) or set(variables) != set(expected):
        has = list(variables) if isinstance(variables, Mapping) else variables
        raise InputError(
            f"variables: must be {{'params': ..., 'batch_stats': ...}} of {kind}, not"
            f" {short(str(has), 100)}"
        )
    arrays: dict[str, Any] = {}
    for collection, shapes in expected.items():
        if not isinstance(variables[collection], Mapping):
            what = short(repr(variables[collection]))
            raise InputError(f"variables: {collection} is {what}, no tree of arrays")
        found = _flat(variables[collection])
        if found.keys() != shapes.keys():
            missing, extra = shapes.keys() - found.keys(), found.keys() - shapes.keys()
            wrong = [f"misses {n}" for n in sorted(missing)]
            wrong += [f"has {n}, which the model has not" for n in sorted(extra)]
            raise InputError(f"variables: {collection} {wrong[0]}")
        for name, leaf in found.items():
            try:
                array = np.asarray(leaf, np.float32)
            except (TypeError, ValueError, OverflowError):
                what = f"{name} is {short(repr(leaf))}, no array of numbers"
                raise InputError(f"variables: {collection} {what}") from None
            if array.shape != shapes[name].shape:
                raise InputError(
                    f"variables: {collection} {name} is {array.shape}, the model needs"
                    f" {shapes[name].shape}"
                )
            if not np.all(np.isfinite(array)):
                raise InputError(
                    f"variables: {collection} {name} has numbers that are not finite"
                )
            is_variance = collection == "batch_stats" and name.endswith(".var")
            if is_variance and np.any(array < 0):
                raise InputError(f"variables: {name} has variances below 0")
            arrays[f"{collection}.{name}"] = array
    return flax.traverse_util.unflatten_dict(arrays, sep=".")
