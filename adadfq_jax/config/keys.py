"""Every configuration key with its default; the files in configs/ start from them.

The keys are made from the rows of `settings`. This module does not import JAX.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from adadfq_jax import settings
from adadfq_jax.errors import InputError
from adadfq_jax.settings import ASSETS as ASSETS
from adadfq_jax.settings import FOLDER as FOLDER


def parse_argument(
    argument: str | None, default: str, known_options: tuple[str, ...] = ()
):
    """Split a config argument 'wKaK[,option...]', as in `--config=file.py:w4a4,paper`.

    Args:
      argument: the text after the colon; None or '' stands for `default`.
      default: the argument to use instead, such as 'w4a4'.
      known_options: names of the options that the config understands.

    Returns:
      (weight_bits, act_bits, set of options).

    Raises:
      InputError: the argument does not parse, a K is outside 2..8, or an option is
        unknown.
    """
    bits, *options = (argument or default).split(",")
    match = re.fullmatch(r"w([2-8])a([2-8])", bits)
    unknown = [o for o in options if o not in known_options]
    if not match or unknown:
        wrong = f"unknown option {unknown[0]!r}" if match else f"{bits!r} is not wKaK"
        choices = f"; options: {', '.join(known_options)}" if known_options else ""
        raise InputError(
            f"config argument {argument!r}: {wrong}. Write wKaK with bits K from 2 to"
            f" 8, then options after commas, as in :{default}{choices}"
        )
    return int(match[1]), int(match[2]), set(options)


def default_config() -> ml_collections.ConfigDict:
    """Return all keys with their defaults; None where the recipe decides the value."""
    tree: dict[str, Any] = {}
    for key, row in settings.ROWS.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        decided_by_recipe = isinstance(row.default, type)
        node[name] = (
            config_dict.placeholder(row.default) if decided_by_recipe else row.default
        )
    return ml_collections.ConfigDict(tree)


def imagenet_config(weight_bits: int, act_bits: int) -> ml_collections.ConfigDict:
    """Return the configuration that all files of ImageNet in configs/ start from."""
    config = default_config()
    config.teacher.num_classes = 1000
    config.teacher.image_shape = (224, 224, 3)
    config.teacher.mean = (0.485, 0.456, 0.406)
    config.teacher.std = (0.229, 0.224, 0.225)
    config.quant.weight_bits = weight_bits
    config.quant.act_bits = act_bits
    config.game.generator = "conditional_bn"
    evaluation = config.eval
    evaluation.dataset, evaluation.split = FOLDER, "validation"
    evaluation.resize, evaluation.batch_size = 256, 100
    config.checkpoint.every = 1000
    return config


def from_json(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Make a configuration from the contents of a run's config.json.

    Raises:
      InputError: a key is unknown, or its value has the wrong type.
    """

    def tuples(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: tuples(value) for key, value in node.items()}
        return tuple(node) if isinstance(node, list) else node

    config = default_config().lock()
    try:
        config.update(tuples(values))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"not a configuration of this version ({reason})") from error
    return config


def _shown_default(default: Any) -> str:
    return "recipe" if isinstance(default, type) else f"`{default!r}`"


def reference() -> str:
    """Return a Markdown table of every key, its default and its meaning."""
    rows = [
        f"| `{key}` | {_shown_default(row.default)} | {row.text} |"
        for key, row in settings.ROWS.items()
    ]
    return "\n".join(["| config. | default | what it is |", "|---|---|---|", *rows])


def refuse_unknown_keys(arguments: Sequence[str]) -> None:
    """Refuse an override `--config.KEY=...` of a key that does not exist.

    Raises:
      InputError: a key does not exist; the message names the most similar key.
    """
    for argument in arguments:
        match = re.match(r"--?config\.([^=]+)", argument)
        if match and match[1] in settings.REMOVED:
            raise InputError(
                f"config.{match[1]}: removed; {settings.REMOVED[match[1]]}"
            )
        if match and match[1] not in settings.ROWS:
            like = settings.nearest(match[1])
            hint = f"; the nearest is config.{like}" if like else ""
            raise InputError(
                f"config.{match[1]}: no such key{hint} (--keys lists them all)"
            )
