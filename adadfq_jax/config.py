"""Every configuration key with its default, for the files in configs/ to start from.

This module holds data: it imports neither JAX nor the rest of the package.
"""

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from ml_collections import config_dict

from adadfq_jax.errors import InputError

ASSETS = Path(__file__).parent / "assets"
BATCH_RULES = ("global", "per_device")
COMPUTE_DTYPES = ("float32", "bfloat16")
RANGE_EMAS = ("corrected", "released")
PRECISIONS = ("default", "high", "highest")  # as JAX names them
ACT_RANGES = ("minmax", "percentile", "mse")
WEIGHT_RANGES = ("minmax", "mse")


def parse_argument(
    argument: str | None, default: str, known_options: tuple[str, ...] = ()
):
    """Splits a config argument 'wKaK[,option...]' as in `--config=file.py:w4a4,paper`.

    Args:
      argument: the text after the colon; None or '' stands for `default`.
      default: e.g. 'w4a4'.
      known_options: option names that the config understands.

    Returns:
      (weight_bits, act_bits, set of options).

    Raises:
      InputError: it does not parse, K is outside 2..8, or an option is unknown.
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


# Key -> (default, what it is). A type instead of a default: the recipe decides.
KEYS: dict[str, tuple[Any, str]] = {
    "recipe": ("adadfq", "the losses, and the defaults of what is the recipe's"),
    "seed": (0, "of the generator's start and of every draw"),
    "devices": (0, "local devices that take part; 0 is all of them"),
    "steps_per_dispatch": (0, "steps compiled into one loop; 0: 1 on CPU, else 50"),
    "compute_dtype": ("float32", "of G and P, or 'bfloat16'; Q is always float32"),
    "matmul_precision": ("highest", "of products on TPU and GPU, as JAX names them"),
    "teacher.path": ("", "P's file: .pth, .pt, .th or .safetensors"),
    "teacher.model": ("resnet20", "P's and Q's network"),
    "teacher.num_classes": (10, "length of the logits"),
    "teacher.image_shape": ((32, 32, 3), "height, width, channels"),
    "teacher.mean": ((0.0, 0.0, 0.0), "per channel, of pixels in [0, 1]"),
    "teacher.std": ((1.0, 1.0, 1.0), "per channel, of pixels in [0, 1]"),
    "teacher.expected_top1": (0.0, "per cent; a warning if P is 2 points below"),
    "quant.weight_bits": (4, "bits of kernels, 2 to 8"),
    "quant.act_bits": (4, "bits of activations, 2 to 8"),
    "quant.range_ema": ("corrected", "average of activation ranges, or 'released'"),
    "quant.act_range": ("minmax", "observed of a batch, or 'percentile' or 'mse'"),
    "quant.weight_range": ("minmax", "of an output channel's kernel, or 'mse'"),
    "quant.learn_ranges": (False, "whether Q trains its activation ranges (LSQ+)"),
    "quant.mask_gradient": (False, "no gradient to activations beyond their range"),
    "quant.reestimate_steps": (0, "batches of G on which Q's BN statistics end"),
    "game.batch_size": (int, "images a step, see batch_rule"),
    "game.batch_rule": (
        "global",
        "batch_size is over all devices, or, 'per_device', of each of them",
    ),
    "game.steps": (int, "of the whole game"),
    "game.observe_steps": (int, "steps in which Q's activation ranges move"),
    "game.warmup_steps": (int, "step from which Q trains; ranges are frozen"),
    "game.reobserve_steps": (0, "steps before that in which they move once more"),
    "game.rate_drops": (tuple, "steps at which both rates drop"),
    "game.rate_drop_factor": (0.1, "factor of both rates at each drop"),
    "game.g_rate": (float, "of G's Adam"),
    "game.q_rate": (float, "of Q's Nesterov SGD"),
    "game.q_weight_decay": (1e-4, "of Q, see q_decay_norms"),
    "game.q_decay_norms": (True, "whether it acts on batch norms and biases too"),
    "game.q_average": (0.0, "decay of an average of Q's weights that is kept as Q"),
    "game.lambda_l": (float, "lower boundary of H'"),
    "game.lambda_u": (float, "upper boundary of H'"),
    "game.alpha_ds": (float, "weight of the disagreement loss"),
    "game.alpha_as": (float, "weight of the agreement loss"),
    "game.beta": (float, "weight of both together"),
    "game.gamma": (float, "weight of the BN statistics"),
    "game.temperature": (float, "of Q's loss"),
    "eval.enabled": (True, "whether P and Q are measured"),
    "eval.dataset": ("", "a TFDS name"),
    "eval.data_dir": ("", "where it is prepared; '' is TFDS's own folder"),
    "eval.split": ("test", "of the data set"),
    "eval.batch_size": (500, "images at once, over all devices"),
    "eval.between": (2, "evaluations of Q between the first and the last"),
    "log.every": (50, "steps between lines of metrics.jsonl, at most"),
    "log.tensorboard": (False, "whether TensorBoard event files are written as well"),
    "report.enabled": (True, "whether the run records what report/index.html shows"),
    "checkpoint.every": (200, "steps between checkpoints; 0: at the end alone"),
    "checkpoint.keep": (3, "checkpoints that stay, at least 2"),
}

# Keys that change nothing in the game itself: a run may be resumed with others.
# P counts by its content, the batch by its effective size.
_BESIDE_THE_GAME = (
    "devices",
    "steps_per_dispatch",
    "teacher.path",
    "teacher.expected_top1",
    "game.steps",
    "game.batch_size",
    "game.batch_rule",
    "eval.",
    "log.",
    "report.",
    "checkpoint.",
)


def default_config() -> ml_collections.ConfigDict:
    """All keys with their defaults; None where the recipe decides."""
    tree: dict[str, Any] = {}
    for key, (default, _) in KEYS.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        is_type = isinstance(default, type)
        node[name] = config_dict.placeholder(default) if is_type else default
    return ml_collections.ConfigDict(tree)


def from_json(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A configuration from the contents of a run's config.json.

    Raises:
      InputError: a key is unknown or of another type.
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


def makes_the_game(key: str) -> bool:
    """Whether runs with other values of a key are other games, longer ones included."""
    return key.startswith("game.") or not key.startswith(_BESIDE_THE_GAME)


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The keys and values of a configuration that change the game's numbers."""
    values = {}
    for key in KEYS:
        if not key.startswith(_BESIDE_THE_GAME):
            value = functools.reduce(
                lambda node, name: node[name], key.split("."), config
            )
            values[key] = value
    return values


def reference() -> str:
    """Every key, its default and what it is, as a Markdown table."""
    rows = [
        f"| `{key}` | {'recipe' if isinstance(v, type) else f'`{v!r}`'} | {doc} |"
        for key, (v, doc) in KEYS.items()
    ]
    return "\n".join(["| config. | default | what it is |", "|---|---|---|", *rows])


def refuse_unknown_keys(arguments: Sequence[str]) -> None:
    """Refuses an override `--config.KEY=...` of a key that there is not.

    Raises:
      InputError: with the nearest key that there is.
    """
    for argument in arguments:
        match = re.match(r"--?config\.([^=]+)", argument)
        if match and match[1] not in KEYS:
            _refuse_key(match[1])


def _refuse_key(wanted: str) -> NoReturn:
    # The last part tells most: people forget the section.
    def likeness(key: str) -> float:
        whole = difflib.SequenceMatcher(None, key, wanted).ratio()
        ends = (key.split(".")[-1], wanted.split(".")[-1])
        return whole + 2 * difflib.SequenceMatcher(None, *ends).ratio()

    nearest = max(KEYS, key=likeness)
    raise InputError(
        f"config.{wanted}: no such key; the nearest is config.{nearest}"
        " (--keys lists them all)"
    )


def _flat_keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses values that cannot work.

    Args:
      config: with the recipe's values filled in, see `build.prepare`.

    Raises:
      InputError: naming the key and what it must be.
    """
    for key in _flat_keys(config.to_dict()):
        if key not in KEYS:  # a configuration file's own
            _refuse_key(key)
    quant, game, p, e = config.quant, config.game, config.teacher, config.eval
    shape = tuple(p.image_shape)
    if len(shape) != 3 or min(shape) < 1 or shape[0] % 4 or shape[1] % 4:
        raise InputError(
            f"config.teacher.image_shape={shape}: must be height, width, channels,"
            " with height and width multiples of 4"
        )
    if not len(p.mean) == len(p.std) == shape[2] or min(p.std) <= 0:
        raise InputError(
            f"config.teacher.mean={tuple(p.mean)} and std={tuple(p.std)}: must have"
            f" {shape[2]} values each, one per channel, std above 0"
        )
    rules: list[tuple[str, Any, bool, str]] = [
        ("quant.weight_bits", quant.weight_bits, 2 <= quant.weight_bits <= 8, "2 to 8"),
        ("quant.act_bits", quant.act_bits, 2 <= quant.act_bits <= 8, "2 to 8"),
        (
            "quant.range_ema",
            quant.range_ema,
            quant.range_ema in RANGE_EMAS,
            " or ".join(RANGE_EMAS),
        ),
        (
            "quant.act_range",
            quant.act_range,
            quant.act_range in ACT_RANGES,
            " or ".join(ACT_RANGES),
        ),
        (
            "quant.weight_range",
            quant.weight_range,
            quant.weight_range in WEIGHT_RANGES,
            " or ".join(WEIGHT_RANGES),
        ),
        (
            "quant.reestimate_steps",
            quant.reestimate_steps,
            quant.reestimate_steps >= 0,
            "0 or more",
        ),
        (
            "game.reobserve_steps",
            game.reobserve_steps,
            0 <= game.reobserve_steps <= game.warmup_steps - game.observe_steps,
            "0 to warmup_steps - observe_steps",
        ),
        ("game.q_average", game.q_average, 0 <= game.q_average < 1, "0 to below 1"),
        ("teacher.num_classes", p.num_classes, p.num_classes >= 2, "at least 2"),
        ("devices", config.devices, config.devices >= 0, "0 or more"),
        (
            "steps_per_dispatch",
            config.steps_per_dispatch,
            config.steps_per_dispatch >= 0,
            "0 or more",
        ),
        (
            "compute_dtype",
            config.compute_dtype,
            config.compute_dtype in COMPUTE_DTYPES,
            " or ".join(COMPUTE_DTYPES),
        ),
        ("game.batch_size", game.batch_size, game.batch_size >= 2, "at least 2"),
        (
            "game.batch_rule",
            game.batch_rule,
            game.batch_rule in BATCH_RULES,
            " or ".join(BATCH_RULES),
        ),
        (
            "game.observe_steps",
            game.observe_steps,
            game.observe_steps >= 1,
            "at least 1: ranges must be seen",
        ),
        (
            "game.warmup_steps",
            game.warmup_steps,
            game.warmup_steps >= game.observe_steps,
            "observe_steps or more: Q trains on frozen ranges",
        ),
        ("game.steps", game.steps, game.steps >= game.warmup_steps, "warmup_steps up"),
        ("game.g_rate", game.g_rate, game.g_rate >= 0, "0 or more"),
        ("game.q_rate", game.q_rate, game.q_rate >= 0, "0 or more"),
        ("game.temperature", game.temperature, game.temperature > 0, "above 0"),
        (
            "game.lambda_l",
            game.lambda_l,
            0 <= game.lambda_l <= game.lambda_u <= 1,
            "0 <= lambda_l <= lambda_u <= 1",
        ),
        ("eval.batch_size", e.batch_size, e.batch_size >= 1, "at least 1"),
        ("eval.between", e.between, e.between >= 0, "0 or more"),
        ("log.every", config.log.every, config.log.every >= 1, "at least 1"),
        (
            "checkpoint.every",
            config.checkpoint.every,
            config.checkpoint.every >= 0,
            "0 or more",
        ),
        (
            "checkpoint.keep",
            config.checkpoint.keep,
            config.checkpoint.keep >= 2,
            "at least 2: one stays while the next is written",
        ),
        (
            "matmul_precision",
            config.matmul_precision,
            config.matmul_precision in PRECISIONS,
            " or ".join(PRECISIONS),
        ),
    ]
    for key, value, holds, must_be in rules:
        if not holds:
            raise InputError(f"config.{key}={value!r}: must be {must_be}")
