"""The settings of a run as frozen plain values, resolved once from a configuration."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adadfq_jax import recipes, settings
from adadfq_jax.errors import InputError
from adadfq_jax.recipes import Recipe
from adadfq_jax.settings import Settings
from adadfq_jax.teacher import hub


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec(Settings):
    """All settings of a run, each with a value, and its recipe.

    Attributes:
      losses: the recipe whose name is `recipe`, with its values for
        `quant.weight_bits`.
    """

    losses: Recipe

    def replace(self, values: Mapping[str, Any]) -> "RunSpec":
        """Return a copy with other values, given by dotted name, and check them.

        Raises:
          InputError: a setting does not exist, or a value is not valid.
        """
        spec = settings.replace(self, values)
        settings.check(spec)
        return spec

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, with absolute paths."""
        values = dataclasses.asdict(
            Settings(
                **{f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)}
            )
        )
        paths = (("teacher", "path"), ("eval", "data_dir"), ("eval", "classes"))
        for section, name in paths:
            path = values[section][name]
            if path and not hub.is_hub(path):
                values[section][name] = str(Path(path).expanduser().resolve())
        return values


_SCHEDULE = ("game.steps", "game.observe_steps", "game.warmup_steps", "game.rate_drops")


def resolve(config: Any, recipe: Recipe | None = None) -> RunSpec:
    """Resolve a configuration: fill in the defaults and the values of the recipe.

    Args:
      config: a ConfigDict, or a mapping of values by section; settings that it leaves
        out have their defaults. It is not changed. A spec is returned as it is.
      recipe: a recipe of your own, with the name config.recipe; None takes the
        package's recipe of that name.

    Returns:
      The spec. Its `eval.enabled` is true only if there is an evaluation set.

    Raises:
      InputError: a setting or the recipe does not exist, or a value is not valid.
    """
    if isinstance(config, RunSpec):
        return config
    tree = config.to_dict() if hasattr(config, "to_dict") else config
    values = {k: v for k, v in settings.flatten(tree).items() if v is not None}
    if values.get("game.steps") == 0:  # the schedule that is given is of another recipe
        values = {k: v for k, v in values.items() if k not in _SCHEDULE}
        values["recipe"], recipe = "calibrate", None
    given = settings.replace(Settings(), values)
    if recipe is None:
        recipe = recipes.get(given.recipe)
    elif given.recipe in recipes.names():
        raise InputError(
            f"recipe={given.recipe!r}: that is a recipe of this package; choose another"
            " name for your own recipe",
            "recipe",
        )
    recipes.check(recipe)
    recipe = recipe.at(given.quant.weight_bits)
    decided = {f"game.{name}": value for name, value in recipe.settings.items()}
    decided |= {f"quant.{name}": value for name, value in recipe.quantizer.items()}
    decided |= {
        f"reconstruction.{name}": value for name, value in recipe.reconstruction.items()
    }
    decided |= {f"calibration.{k}": v for k, v in recipe.calibration.items()}
    # A game in which Q does not train stays one, whatever its length.
    plan, steps = recipe.settings, given.game.steps or 0
    if steps > 0 and plan.get("warmup_steps", -1) == plan.get("steps"):
        decided |= {"game.observe_steps": steps, "game.warmup_steps": steps}
    filled = settings.fill(given, given.recipe, decided)
    filled = settings.replace(
        filled,
        {
            "eval.enabled": filled.eval.measures,
            "recipe": recipes.full_name(filled.recipe),
        },
    )
    settings.check(filled)
    sections = {f.name: getattr(filled, f.name) for f in dataclasses.fields(Settings)}
    return RunSpec(**sections, losses=recipe)


def identity(
    spec: RunSpec,
    *,
    batch_size: int,
    weights: Mapping[str, float],
    p_digest: str,
) -> dict[str, Any]:
    """Return everything that changes the numbers of a run, as JSON values by name.

    Args:
      spec: the settings of the run.
      batch_size: size of the global batch.
      weights: weights of the terms of both losses, by name.
      p_digest: SHA-256 of P's variables.
    """
    names = [name for name in settings.ROWS if settings.is_identity(name)]
    for name in settings.LATER:
        if settings.get(spec, name) == settings.ROWS[name].default:
            names.remove(name)
    if not spec.reconstruction.iterations:
        names = [name for name in names if not name.startswith("reconstruction.")]
    if not spec.calibration.images:
        names.remove("calibration.images")
    return {
        **{name: settings.get(spec, name) for name in names},
        "game.batch_size": batch_size,
        # A recipe of the user's own may change these without a change of its name.
        "recipe.settings": json.loads(json.dumps(spec.losses.settings)),
        "recipe.weights": dict(weights),
        "teacher.sha256": p_digest,
        # Once blocks are reconstructed, a later start cannot make the game longer.
        **({"game.steps": spec.game.steps} if spec.reconstruction.iterations else {}),
    }
