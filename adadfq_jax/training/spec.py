"""What a run is made of, as frozen plain values: a configuration, resolved once."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adadfq_jax import recipes, settings
from adadfq_jax.errors import InputError
from adadfq_jax.recipes import Recipe
from adadfq_jax.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec(Settings):
    """All settings of a run, none left open, and its recipe.

    Attributes:
      losses: the recipe whose name is `recipe`, with plain values: those for
        `quant.weight_bits`.
    """

    losses: Recipe

    def replace(self, values: Mapping[str, Any]) -> "RunSpec":
        """A copy with other values, by dotted name, checked.

        Raises:
          InputError: there is no such setting, or a value cannot work.
        """
        spec = settings.replace(self, values)
        settings.check(spec)
        return spec

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; their paths hold from any folder."""
        values = dataclasses.asdict(
            Settings(
                **{f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)}
            )
        )
        paths = (("teacher", "path"), ("eval", "data_dir"), ("eval", "classes"))
        for section, name in paths:
            path = values[section][name]
            values[section][name] = path and str(Path(path).resolve())
        return values


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def resolve(config: Any, recipe: Recipe | None = None) -> RunSpec:
    """The settings of a configuration, with what the recipe decides filled in.

    Args:
      config: a ConfigDict, or a mapping of values by section; what it leaves out has
        its default. It is not changed. A spec is returned as it is.
      recipe: one of your own, whose name is config.recipe; None finds one of this
        package by its name.

    Returns:
      The spec. Its `eval.enabled` says whether there is something to measure on.

    Raises:
      InputError: there is no such setting or recipe, or a value cannot work.
    """
    if isinstance(config, RunSpec):
        return config
    values = config.to_dict() if hasattr(config, "to_dict") else config
    given = settings.replace(Settings(), dict(_flat(values)))
    if recipe is None:
        recipe = recipes.get(given.recipe)
    elif given.recipe in recipes.names():
        raise InputError(
            f"recipe={given.recipe!r}: that is a recipe of this package; choose another"
            " name for one of your own",
            "recipe",
        )
    recipe = recipe.at(given.quant.weight_bits)
    decided = {f"game.{name}": value for name, value in recipe.settings.items()}
    decided |= {f"quant.{name}": value for name, value in recipe.quantizer.items()}
    decided |= {
        f"reconstruction.{name}": value for name, value in recipe.reconstruction.items()
    }
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
    """Everything that changes the numbers of a game, as JSON values by name.

    Args:
      spec: of the run.
      batch_size: of the global batch.
      weights: of the terms of both losses, by name.
      p_digest: SHA-256 of P's variables.
    """
    names = [name for name in settings.ROWS if settings.is_identity(name)]
    if not spec.reconstruction.iterations:
        names = [name for name in names if not name.startswith("reconstruction.")]
    return {
        **{name: settings.get(spec, name) for name in names},
        "game.batch_size": batch_size,
        # What a recipe from outside the package may have changed under its name.
        "recipe.settings": json.loads(json.dumps(spec.losses.settings)),
        "recipe.weights": dict(weights),
        "teacher.sha256": p_digest,
        # A game that is reconstructed cannot be played on.
        **({"game.steps": spec.game.steps} if spec.reconstruction.iterations else {}),
    }
