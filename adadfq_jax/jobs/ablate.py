"""The grid of a comparison: arms x bits x seeds; each cell is a run of the main job."""

import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from adadfq_jax import config as base
from adadfq_jax import recipes, settings
from adadfq_jax.errors import InputError, NumericalError
from adadfq_jax.jobs import train
from adadfq_jax.jobs.configuration import keys_in_messages, resolved
from adadfq_jax.recipes import Recipe
from adadfq_jax.report.ablation import Arm, Cell, Result
from adadfq_jax.runtime.signals import StopRequest
from adadfq_jax.training import workdir
from adadfq_jax.training.spec import RunSpec


def parse_settings(text: str) -> dict[str, Any]:
    """Parse 'KEY=VALUE KEY=VALUE' into values by key.

    A value is a Python literal; anything else is taken as a string.

    Raises:
      InputError: the text does not have this form, or a key does not exist.
    """
    found: dict[str, Any] = {}
    for item in text.split():
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"{item!r}: settings are written KEY=VALUE")
        base.refuse_unknown_keys([f"--config.{item}"])
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def parse_arm(text: str) -> Arm:
    """Parse an arm from 'NAME' or 'NAME: KEY=VALUE KEY=VALUE'.

    Raises:
      InputError: the name has other characters than letters, digits, '_', '-', '.'
        and '+', or the settings are not valid.
    """
    name, _, settings = text.partition(":")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise InputError(
            f"arm {text!r}: write NAME: KEY=VALUE KEY=VALUE; the name consists of"
            " letters, digits and _ - . +"
        )
    return Arm(name, parse_settings(settings))


def cells(arms: Sequence[Arm], bits: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return all cells, ordered by seed, so that a finished part is already a table.

    Raises:
      InputError: there are no bits or seeds, or an arm, bits or a seed come twice.
    """
    given = {"arm": [arm.name for arm in arms], "bits": bits, "seeds": seeds}
    for name, values in given.items():
        if not values:
            raise InputError(f"--{name}: give at least one")
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise InputError(f"--{name}: {twice[0]} is given twice")
    return [Cell(arm, b, seed) for seed in seeds for b in bits for arm in arms]


def configure(
    make_config: Callable[[str], ConfigDict],
    cell: Cell,
    common: dict[str, Any],
    half: str = "",
    recipe: Recipe | None = None,
) -> RunSpec:
    """Return the spec of a cell.

    Args:
      make_config: 'wKaK' -> the configuration.
      cell: the cell.
      common: values that all cells set; those of the arm override them.
      half: slice of the evaluation split, '' for the whole split.
      recipe: the recipe of the configuration file, used if config.recipe is no recipe
        of the package.

    Raises:
      InputError: a value has the wrong type or is not valid, or there is no
        evaluation set.
    """
    config = make_config(cell.bits)
    values = {
        "checkpoint.every": 0,
        "report.enabled": False,
        "export.onnx": False,
        "export.stablehlo": False,
        **common,
        **cell.arm.overrides,
    }
    of_cell = {"seed", "quant.weight_bits", "quant.act_bits"}
    for key in sorted(of_cell & common.keys()):
        raise InputError(f"--set: config.{key} is given by --bits and --seeds")
    for key in cell.arm.overrides:
        fixed = key in of_cell or key == "population"
        if fixed or key.startswith(("eval.", "teacher.")):
            raise InputError(
                f"arm {cell.arm.name!r}: config.{key} is the same for all arms"
                " (--bits, --seeds, --set)"
            )
    try:
        config.update_from_flattened_dict(values)
        config.seed = cell.seed
    except (TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"arm {cell.arm.name!r}: {reason}") from error
    if half:
        if "[" in config.eval.split:
            raise InputError(
                f"--half: config.eval.split={config.eval.split} has a slice already"
            )
        config.eval.split += half
    if config.population:
        raise InputError(f"arm {cell.arm.name!r}: a cell is one game, not a population")
    own = None if config.recipe in recipes.names() else recipe
    try:
        # Refuse a wrong cell now, not when its turn comes after hours.
        with resolved(config, own) as spec:
            pass
    except InputError as error:
        raise InputError(f"arm {cell.arm.name!r}: {error}") from error
    if not spec.eval.measures:
        raise InputError(
            "config.eval.enabled=False, no config.eval.dataset, or a folder without"
            " config.eval.data_dir: nothing could be compared"
        )
    return spec


def play(
    cell: Cell, spec: RunSpec, folder: Path, stop: StopRequest | None = None
) -> Result:
    """Train a cell's run in `folder`, or resume it; read the result if it is finished.

    A run that reached a non-finite number is a result as well and does not run again.

    Raises:
      InputError, Stopped: see `train.run`.
    """
    _refuse_other(spec, folder)
    failure = workdir.failure_of(folder)
    if not failure:
        try:
            with keys_in_messages():
                summary = train.run(spec, folder, stop)
            return read_result(cell, summary, folder)
        except NumericalError as error:  # the run has written it into its folder
            failure = str(error)
        finally:
            # Every compiled program maps memory, and Linux allows a process 65,530
            # mappings. Beyond that, compiling would end the process.
            jax.clear_caches()
    q = spec.quant
    own = (q.first_last_bits, q.places, bool(q.layer_bits or q.budget))
    return Result(cell, math.nan, math.nan, (), failure, *own)


def _refuse_other(spec: RunSpec, folder: Path) -> None:
    """Refuse a cell's folder whose run was trained or evaluated with other settings.

    `train.run` refuses another game, but not another evaluation set. And for a failed
    run it is not called.
    """
    file = folder / workdir.CONFIG_FILE
    if not file.exists():
        return
    there = settings.complete(settings.flatten(workdir.read_json(file)))
    here = settings.flatten(json.loads(json.dumps(spec.to_json())))
    for name in sorted(here):
        compared = settings.differs_in_result(name) or name.startswith("eval.")
        if not compared or name.endswith((".batch_size", ".between", ".steps")):
            continue
        if there.get(name) != here[name]:
            raise InputError(
                f"{folder}: config.{name} is {there.get(name)!r} there and"
                f" {here[name]!r} here; choose another workdir"
            )


def read_result(cell: Cell, summary: dict[str, Any], folder: Path) -> Result:
    """Read the result of a finished run from its summary and its log."""
    rows = [json.loads(x) for x in (folder / workdir.METRICS_FILE).open()]
    steps = np.asarray([0, *(row["step"] for row in rows)])
    rates = np.asarray([row["steps_per_second"] for row in rows])
    seconds = np.concatenate([[0], np.cumsum(np.diff(steps) / rates)])
    evaluations = [(e["step"], e["q_top1"]) for e in summary["evaluations"]]
    curve = tuple(
        (step, float(np.interp(step, steps, seconds)), top1)
        # There is only one evaluation if Q never trains.
        for step, top1 in evaluations[1:] or evaluations
    )
    # Runs of earlier versions do not have these keys.
    names = ("first_last_bits", "places", "layer_bits")
    own = {name: summary[name] for name in names if name in summary}
    return Result(cell, summary["p_top1"], evaluations[0][1], curve, **own)
