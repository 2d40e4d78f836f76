"""Resolving a configuration to a spec, and naming its keys in messages."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from adadfq_jax import recipes, settings
from adadfq_jax.errors import InputError, NumericalError
from adadfq_jax.network import Function
from adadfq_jax.recipes import Recipe
from adadfq_jax.runtime import multihost
from adadfq_jax.runtime.progress import log, say
from adadfq_jax.training import build
from adadfq_jax.training.spec import RunSpec, resolve

# Names of arguments in messages of other modules -> the keys of these settings.
_ARGUMENTS = {
    "batch_norms": "teacher.batch_norms",
    "image_shape": "teacher.image_shape",
    "batch_size": "game.batch_size",
    "batch_rule": "game.batch_rule",
    "devices": "devices",
    "members_at_once": "members_at_once",
    "recipe": "recipe",
}
_DOTTED = "|".join(re.escape(name) for name in settings.ROWS if "." in name)


def to_keys(text: str, *arguments: str) -> str:
    """Replace the names of settings and arguments in a message by configuration keys.

    Args:
      text: the message.
      *arguments: names of arguments in it, see `errors.InputError`.
    """
    text = re.sub(rf"(?<![\w./])({_DOTTED})(?![\w.]\w)", r"config.\1", text)
    for name in arguments:
        if name in _ARGUMENTS:
            key = f"config.{_ARGUMENTS[name]}="
            text = re.sub(rf"(?<![\w.]){name}=", key, text)
    return text


def load_teacher(spec: RunSpec) -> tuple[Function, RunSpec]:
    """Load P and complete the spec; print which network was recognised, if it was."""
    loaded = build.load_teacher(spec)
    if loaded.note:
        say(to_keys(loaded.note))
    return loaded.function, loaded.spec


@contextlib.contextmanager
def keys_in_messages() -> Iterator[None]:
    """Name configuration keys in the errors that are raised within."""
    try:
        yield
    except InputError as error:
        message = to_keys(str(error), *error.arguments)
        if message == str(error):
            raise
        raise InputError(message) from error
    except NumericalError as error:
        raise NumericalError(to_keys(str(error))) from error


@contextlib.contextmanager
def resolved(
    config: Any, recipe: Recipe | None = None, *, trains: bool = True
) -> Iterator[RunSpec]:
    """Yield the spec of a configuration, and set up the work with it.

    Within, matrix products have the spec's precision, and errors name configuration
    keys.

    Args:
      config: see `training.spec.resolve`. If it is a spec already, errors name its
        settings instead of configuration keys.
      recipe: a recipe of the user's own; None takes the package's, by name.
      trains: whether the losses are needed. If they are not, the recipe of the user's
        own may be missing: everything else is in the config.json of its run.

    Raises:
      InputError: a key or the recipe does not exist, or a value is not valid.
    """
    name = config.recipe if hasattr(config, "recipe") else config.get("recipe")
    name = name or settings.ROWS["recipe"].default

    def resolve_here() -> RunSpec:
        if recipe is None and not trains and name not in recipes.names():
            return resolve(config, Recipe({}, {}, {}, {}))
        return resolve(config, recipe)

    is_spec = isinstance(config, RunSpec)
    with contextlib.nullcontext() if is_spec else keys_in_messages():
        spec = multihost.together(resolve_here)
        if trains and name in recipes.names() and name != spec.recipe:
            log.info(f"recipe {name}: {spec.recipe}")
        with jax.default_matmul_precision(spec.matmul_precision):
            yield spec
