"""Every configuration key with its default, for the files in configs/ to start from.

This module holds data: it imports neither JAX nor the rest of the package.
"""

import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from ml_collections import config_dict

from adadfq_jax.errors import InputError

ASSETS = Path(__file__).parents[1] / "assets"
GENERATORS = ("embedding", "conditional_bn")
BATCH_RULES = ("global", "per_device")
COMPUTE_DTYPES = ("float32", "bfloat16")
RANGE_EMAS = ("corrected", "released")
LAYOUTS = ("NHWC", "NCHW")
FOLDER = "folder"  # config.eval.dataset: class folders of images, no TFDS set
FILTERS = ("bilinear", "bicubic")
PRECISIONS = ("default", "high", "highest")  # as JAX names them
STEPS_PER_EPOCH = 200  # of the released configurations
ACT_RANGES = ("minmax", "percentile", "mse", "l3")
WEIGHT_RANGES = ("minmax", "mse")
# Of config.game: numbers of the losses in which members of a population may differ.
LOSS_SETTINGS = ("lambda_l", "lambda_u", "alpha_ds", "alpha_as")


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
    "population": (
        "",
        "games played at once, as in 'seed=0,1,2'; see Populations in configs/README",
    ),
    "members_at_once": (
        0,
        "members of a population in one computation on a device; 0: 1 on CPU, else all",
    ),
    "devices": (0, "devices of each process that take part; 0 is all of them"),
    "steps_per_dispatch": (0, "steps compiled into one loop; 0: 1 on CPU, else 50"),
    "compute_dtype": ("float32", "of G and P, or 'bfloat16'; Q is always float32"),
    "matmul_precision": ("highest", "of products on TPU and GPU, as JAX names them"),
    "teacher.path": ("", "P's file: .pth, .pt, .th or .safetensors"),
    "teacher.model": ("", "P's and Q's network; '' is told from the names in the file"),
    "teacher.num_classes": (10, "length of the logits"),
    "teacher.image_shape": ((32, 32, 3), "height, width, channels"),
    "teacher.mean": ((0.0, 0.0, 0.0), "per channel, of pixels in [0, 1]"),
    "teacher.std": ((1.0, 1.0, 1.0), "per channel, of pixels in [0, 1]"),
    "teacher.expected_top1": (0.0, "per cent; a warning if P is 2 points below"),
    "quant.weight_bits": (4, "bits of kernels, 2 to 8"),
    "quant.act_bits": (4, "bits of activations, 2 to 8"),
    "quant.first_last_bits": (
        0,
        "bits of the first and last layer's kernels and of the last's input, 2 to 8,"
        " another setting than without; 0: as all others",
    ),
    "quant.range_ema": ("corrected", "average of activation ranges, or 'released'"),
    "quant.act_range": (str, "of a batch: 'minmax', 'percentile', 'mse' or 'l3'"),
    "quant.weight_range": (str, "of a kernel's channel: 'minmax', or 'mse' as on P"),
    "quant.learn_ranges": (False, "whether Q trains its activation ranges (LSQ+)"),
    "quant.mask_gradient": (bool, "no gradient to activations beyond their range"),
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
    "game.generator": (
        "embedding",
        "what the label does in G: it scales the latents, or, 'conditional_bn', it"
        " picks the scale and bias of G's batch norms",
    ),
    "game.g_rate": (float, "of G's Adam"),
    "game.q_rate": (float, "of Q's Nesterov SGD"),
    "game.q_weight_decay": (1e-4, "of Q, see q_decay_norms"),
    "game.q_decay_norms": (True, "whether it acts on batch norms and biases too"),
    "game.q_average": (float, "decay of an average of Q's weights that is kept as Q"),
    "game.framed_weight": (
        float,
        "weight of Q's loss on images in flat black or white frames, 0: none",
    ),
    "game.lambda_l": (float, "lower boundary of H'"),
    "game.lambda_u": (float, "upper boundary of H'"),
    "game.alpha_ds": (float, "weight of the disagreement loss"),
    "game.alpha_as": (float, "weight of the agreement loss"),
    "game.beta": (float, "weight of both together"),
    "game.gamma": (float, "weight of the BN statistics"),
    "game.temperature": (float, "of Q's loss"),
    "eval.enabled": (True, "whether P and Q are measured"),
    "eval.dataset": (
        "",
        "a TFDS name, or 'folder' for images DATA_DIR/CLASS/IMAGE; '': nothing is"
        " measured",
    ),
    "eval.data_dir": (
        "",
        "the folder, without which nothing is measured; or where a TFDS set is"
        " prepared, '' is TFDS's own",
    ),
    "eval.split": (
        "test",
        "of a TFDS set, with or without a slice; of a folder, [A:B]",
    ),
    "eval.classes": ("", "file of a folder's classes in P's order; '': sorted names"),
    "eval.resize": (0, "shorter side before the centre crop; 0: images have P's size"),
    "eval.filter": ("bilinear", "of resizing, antialiased, or 'bicubic'"),
    "eval.batch_size": (500, "images at once, over all devices"),
    "eval.between": (2, "evaluations of Q between the first and the last"),
    "export.onnx": (True, "whether quantized.onnx is written at the end"),
    "export.stablehlo": (True, "whether quantized.stablehlo is written at the end"),
    "export.layout": ("NHWC", "of the ONNX file's images, or 'NCHW'"),
    "export.pixels": (False, "whether they are uint8 pixels, normalised inside"),
    "export.uint8_only": (False, "a byte a code, for ONNX runtimes before opset 21"),
    "log.every": (50, "steps between lines of metrics.jsonl, at most"),
    "log.tensorboard": (False, "whether TensorBoard event files are written as well"),
    "report.enabled": (True, "whether the run records what report/index.html shows"),
    "checkpoint.every": (200, "steps between checkpoints; 0: at the end alone"),
    "checkpoint.keep": (3, "checkpoints that stay, at least 2"),
}

# Keys that change nothing in the game itself: a run may be resumed with others.
# P counts by its content, the batch by its effective size.
_BESIDE_THE_GAME = (
    "population",
    "members_at_once",
    "devices",
    "steps_per_dispatch",
    "teacher.path",
    "teacher.expected_top1",
    "game.steps",
    "game.batch_size",
    "game.batch_rule",
    "eval.",
    "export.",
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


# This file is a configuration file too, of the defaults: for modes that need no recipe.
get_config = default_config


def imagenet_config(weight_bits: int, act_bits: int) -> ml_collections.ConfigDict:
    """What the released ImageNet configurations have in common."""
    config = default_config()
    config.teacher.num_classes = 1000
    config.teacher.image_shape = (224, 224, 3)
    config.teacher.mean = (0.485, 0.456, 0.406)
    config.teacher.std = (0.229, 0.224, 0.225)
    config.quant.weight_bits = weight_bits
    config.quant.act_bits = act_bits
    game = config.game
    game.generator, game.temperature = "conditional_bn", 5.0
    game.batch_size, game.g_rate = 16, 1e-3
    game.steps, game.observe_steps = 400 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH
    evaluation = config.eval
    evaluation.dataset, evaluation.split = FOLDER, "validation"
    evaluation.resize, evaluation.batch_size = 256, 100
    config.checkpoint.every = 1000
    return config


def enlarge_batch(config: ml_collections.ConfigDict, batch_size: int) -> None:
    """Makes a configuration play as many images in larger batches, in place.

    It must set batch, steps and rates itself, not leave them to the recipe.

    With k = batch_size / the batch so far: every number of steps is divided by k
    (rounded up), Q's rate of SGD is multiplied by k (Goyal et al., 2017, arXiv
    1706.02677) and G's rate of Adam by sqrt(k) (Malladi et al., 2022, arXiv
    2205.10287).
    """
    game = config.game
    factor = batch_size / game.batch_size
    game.batch_size = batch_size
    for key in ("steps", "observe_steps", "warmup_steps"):
        game[key] = math.ceil(game[key] / factor)
    game.rate_drops = tuple(math.ceil(step / factor) for step in game.rate_drops)
    game.q_rate *= factor
    game.g_rate *= math.sqrt(factor)


def recorded(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values for a run's config.json; its paths hold from any folder."""
    values = config.to_dict()
    paths = (("teacher", "path"), ("eval", "data_dir"), ("eval", "classes"))
    for section, key in paths:
        path = values[section][key]
        values[section][key] = path and str(Path(path).resolve())
    return values


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


def bits_label(weight_bits: int, act_bits: int, first_last_bits: int = 0) -> str:
    """What a setting is called: 'W4A4', or 'W4A4 first/last 8'."""
    ends = f" first/last {first_last_bits}" if first_last_bits else ""
    return f"W{weight_bits}A{act_bits}{ends}"


def measures(evaluation: ml_collections.ConfigDict) -> bool:
    """Whether there is something to measure on, by `config.eval`."""
    named = evaluation.data_dir if evaluation.dataset == FOLDER else evaluation.dataset
    return bool(evaluation.enabled and named)


def dataset_name(dataset: str, data_dir: str) -> str:
    """What an evaluation set is called: its TFDS name, or 'folder NAME'."""
    return f"{dataset} {Path(data_dir).name}" if dataset == FOLDER else dataset


def split_name(dataset: str, data_dir: str, split: str) -> str:
    """What the part of it that is taken is called: 'cifar10 test', 'folder val[:9]'."""
    if dataset == FOLDER:
        return dataset_name(dataset, data_dir) + split[len(split.split("[")[0]) :]
    return f"{dataset} {split}"


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
            refuse_key(match[1])


def refuse_key(wanted: str) -> NoReturn:
    """Refuses a key that there is not, with the nearest that there is."""

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
