"""Every setting of a run: its default, what it means, and which values can work.

Frozen dataclasses of plain typed values, one a section. The configuration keys are made
from them (`config.keys`), and so is what a run is built of (`training.spec`): a setting
is written down once, here. Settings without a default are the recipe's to decide.
"""

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from adadfq_jax.errors import InputError

ASSETS = Path(__file__).parent / "assets"
FOLDER = "folder"  # eval.dataset: class folders of images, no TFDS set
ACT_RANGES = ("minmax", "percentile", "mse", "l3")
WEIGHT_RANGES = ("minmax", "mse")
# Numbers of the losses in which members of a population may differ.
LOSS_SETTINGS = ("lambda_l", "lambda_u", "alpha_ds", "alpha_as")


class Rule(NamedTuple):
    """Which values a setting takes: a test, and the same in words."""

    holds: Callable[[Any], bool]
    must_be: str


def _between(least: float, most: float) -> Rule:
    return Rule(lambda value: least <= value <= most, f"{least} to {most}")


def _at_least(least: float, why: str = "") -> Rule:
    return Rule(lambda value: value >= least, f"at least {least}{why}")


def _one_of(*values: str) -> Rule:
    return Rule(lambda value: value in values, " or ".join(values))


_NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "0 or more")
_BITS = _between(2, 8)
_BITS_OR_0 = Rule(lambda value: value == 0 or 2 <= value <= 8, "0 or 2 to 8")
_ANY = Rule(lambda value: True, "")


def _setting(default: Any, text: str, rule: Rule = _ANY) -> Any:
    return dataclasses.field(default=default, metadata={"text": text, "rule": rule})


def _from_recipe(kind: type, text: str, rule: Rule = _ANY) -> Any:
    metadata = {"text": text, "rule": rule, "type": kind}
    return dataclasses.field(default=None, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """P: its file, its network, and how its images are normalised."""

    path: str = _setting("", "P's file: .pth, .pt, .th or .safetensors")
    model: str = _setting(
        "", "P's and Q's network; '' is told from the names in the file"
    )
    num_classes: int = _setting(10, "length of the logits", _at_least(2))
    image_shape: tuple[int, ...] = _setting((32, 32, 3), "height, width, channels")
    mean: tuple[float, ...] = _setting(
        (0.0, 0.0, 0.0), "per channel, of pixels in [0, 1]"
    )
    std: tuple[float, ...] = _setting(
        (1.0, 1.0, 1.0), "per channel, of pixels in [0, 1]"
    )
    layout: str = _setting(
        "NHWC",
        "of the images that the network itself takes, or 'NCHW'; image_shape stays",
        _one_of("NHWC", "NCHW"),
    )
    expected_top1: float = _setting(0.0, "per cent; a warning if P is 2 points below")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quant:
    """How Q's kernels and activations are quantized."""

    weight_bits: int = _setting(4, "bits of kernels, 2 to 8", _BITS)
    act_bits: int = _setting(4, "bits of activations, 2 to 8", _BITS)
    first_last_bits: int = _setting(
        0,
        "bits of the first and last layer's kernels and of the last's input, 2 to 8,"
        " another setting than without; 0: as all others",
        _BITS_OR_0,
    )
    range_ema: str = _setting(
        "corrected",
        "average of activation ranges, or 'released'",
        _one_of("corrected", "released"),
    )
    act_range: str = _from_recipe(
        str,
        "of a batch: 'minmax', 'percentile', 'mse' or 'l3'",
        _one_of(*ACT_RANGES),
    )
    weight_range: str = _from_recipe(
        str,
        "of a kernel's channel: 'minmax', or 'mse' as on P",
        _one_of(*WEIGHT_RANGES),
    )
    learn_ranges: bool = _setting(
        False, "whether Q trains its activation ranges (LSQ+)"
    )
    mask_gradient: bool = _from_recipe(
        bool, "no gradient to activations beyond their range"
    )
    places: str = _setting(
        "nonlinearities",
        "where activations are quantized: after them (the paper's), or, 'all', whatever"
        " enters a convolution, a product or a sum, the images too: another setting",
        _one_of("nonlinearities", "all"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Game:
    """The two-player game: schedule, optimizers, and the numbers of its losses."""

    batch_size: int = _from_recipe(int, "images a step, see batch_rule", _at_least(2))
    batch_rule: str = _setting(
        "global",
        "batch_size is over all devices, or, 'per_device', of each of them",
        _one_of("global", "per_device"),
    )
    steps: int = _from_recipe(int, "of the whole game")
    observe_steps: int = _from_recipe(
        int,
        "steps in which Q's activation ranges move",
        _at_least(1, ": ranges must be seen"),
    )
    warmup_steps: int = _from_recipe(int, "step from which Q trains; ranges are frozen")
    reobserve_steps: int = _setting(0, "steps before that in which they move once more")
    rate_drops: tuple[int, ...] = _from_recipe(tuple, "steps at which both rates drop")
    rate_drop_factor: float = _setting(0.1, "factor of both rates at each drop")
    generator: str = _setting(
        "embedding",
        "what the label does in G: it scales the latents, or, 'conditional_bn', it"
        " picks the scale and bias of G's batch norms",
        _one_of("embedding", "conditional_bn"),
    )
    g_rate: float = _from_recipe(float, "of G's Adam", _NOT_NEGATIVE)
    q_rate: float = _from_recipe(float, "of Q's Nesterov SGD", _NOT_NEGATIVE)
    q_weight_decay: float = _setting(1e-4, "of Q, see q_decay_norms")
    q_decay_norms: bool = _setting(
        True, "whether it acts on batch norms and biases too"
    )
    q_average: float = _from_recipe(
        float,
        "decay of an average of Q's weights that is kept as Q",
        Rule(lambda value: 0 <= value < 1, "0 to below 1"),
    )
    framed_weight: float = _from_recipe(
        float,
        "weight of Q's loss on images in flat black or white frames, 0: none",
        _NOT_NEGATIVE,
    )
    lambda_l: float = _from_recipe(float, "lower boundary of H'")
    lambda_u: float = _from_recipe(float, "upper boundary of H'")
    alpha_ds: float = _from_recipe(float, "weight of the disagreement loss")
    alpha_as: float = _from_recipe(float, "weight of the agreement loss")
    beta: float = _from_recipe(float, "weight of both together")
    gamma: float = _from_recipe(float, "weight of the BN statistics")
    temperature: float = _from_recipe(
        float, "of Q's loss", Rule(lambda value: value > 0, "above 0")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Block-wise reconstruction after the game, on images of its G."""

    iterations: int = _from_recipe(
        int, "of each block; 0: no reconstruction", _NOT_NEGATIVE
    )
    images: int = _setting(1024, "of G that the blocks learn from", _at_least(1))
    framed: float = _setting(
        0.5, "part of them in flat black or white frames", _between(0, 1)
    )
    batch_size: int = _setting(
        32, "images an iteration, over all devices", _at_least(1)
    )
    rate: float = _setting(
        7.5e-3,
        "of Adam on the rounding; about 1.5 / iterations",
        _NOT_NEGATIVE,
    )
    factor_rate: float = _setting(
        3e-3,
        "of Adam on the logarithms of scales and ranges; falls to 0",
        _NOT_NEGATIVE,
    )
    penalty: float = _setting(
        0.01, "weight of the penalty on what is not rounded", _NOT_NEGATIVE
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """What P and Q are measured on."""

    enabled: bool = _setting(True, "whether P and Q are measured")
    dataset: str = _setting(
        "",
        "a TFDS name, or 'folder' for images DATA_DIR/CLASS/IMAGE; '': nothing is"
        " measured",
    )
    data_dir: str = _setting(
        "",
        "the folder, without which nothing is measured; or where a TFDS set is"
        " prepared, '' is TFDS's own",
    )
    split: str = _setting(
        "test", "of a TFDS set, with or without a slice; of a folder, [A:B]"
    )
    classes: str = _setting(
        "", "file of a folder's classes in P's order; '': sorted names"
    )
    resize: int = _setting(
        0, "shorter side before the centre crop; 0: images have P's size"
    )
    filter: str = _setting(
        "bilinear",
        "of resizing, antialiased, or 'bicubic'",
        _one_of("bilinear", "bicubic"),
    )
    batch_size: int = _setting(500, "images at once, over all devices", _at_least(1))
    between: int = _setting(
        2, "evaluations of Q between the first and the last", _NOT_NEGATIVE
    )

    @property
    def measures(self) -> bool:
        """Whether there is something to measure on."""
        named = self.data_dir if self.dataset == FOLDER else self.dataset
        return bool(self.enabled and named)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Files of Q for other runtimes."""

    onnx: bool = _setting(True, "whether quantized.onnx is written at the end")
    stablehlo: bool = _setting(
        True, "whether quantized.stablehlo is written at the end"
    )
    layout: str = _setting(
        "NHWC", "of the ONNX file's images, or 'NCHW'", _one_of("NHWC", "NCHW")
    )
    pixels: bool = _setting(False, "whether they are uint8 pixels, normalised inside")
    uint8_only: bool = _setting(
        False, "a byte a code, for ONNX runtimes before opset 21"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """The log of a run."""

    every: int = _setting(
        50, "steps between lines of metrics.jsonl, at most", _at_least(1)
    )
    tensorboard: bool = _setting(
        False, "whether TensorBoard event files are written as well"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a run."""

    enabled: bool = _setting(
        True, "whether the run records what report/index.html shows"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The checkpoints of a run."""

    every: int = _setting(
        200, "steps between checkpoints; 0: at the end alone", _NOT_NEGATIVE
    )
    keep: int = _setting(
        3,
        "checkpoints that stay, at least 2",
        _at_least(2, ": one stays while the next is written"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run."""

    recipe: str = _setting(
        "adadfq", "the losses, and the defaults of what is the recipe's"
    )
    seed: int = _setting(0, "of the generator's start and of every draw")
    population: str = _setting(
        "",
        "games played at once, as in 'seed=0,1,2'; see Populations in configs/README",
    )
    members_at_once: int = _setting(
        0,
        "members of a population in one computation on a device; 0: 1 on CPU, else all",
        _NOT_NEGATIVE,
    )
    devices: int = _setting(
        0, "devices of each process that take part; 0 is all of them", _NOT_NEGATIVE
    )
    steps_per_dispatch: int = _setting(
        0, "steps compiled into one loop; 0: 1 on CPU, else 50", _NOT_NEGATIVE
    )
    compute_dtype: str = _setting(
        "float32",
        "of G and P, or 'bfloat16'; Q is always float32",
        _one_of("float32", "bfloat16"),
    )
    matmul_precision: str = _setting(
        "highest",
        "of products on TPU and GPU, as JAX names them",
        _one_of("default", "high", "highest"),
    )
    teacher: Teacher = Teacher()
    quant: Quant = Quant()
    game: Game = Game()
    reconstruction: Reconstruction = Reconstruction()
    eval: Eval = Eval()
    export: Export = Export()
    log: Log = Log()
    report: Report = Report()
    checkpoint: Checkpoint = Checkpoint()


class Row(NamedTuple):
    """A setting: its dotted name, default (or a type: the recipe decides), and text."""

    name: str
    default: Any
    text: str
    rule: Rule


def _rows(section: Any, prefix: str = "") -> Iterator[Row]:
    for field in dataclasses.fields(section):
        if "text" in field.metadata:
            default = field.metadata.get("type", field.default)
            rule, text = field.metadata["rule"], field.metadata["text"]
            yield Row(prefix + field.name, default, text, rule)
        else:
            yield from _rows(field.default, f"{field.name}.")


ROWS: dict[str, Row] = {row.name: row for row in _rows(Settings)}

# Settings that change nothing in the numbers of a game: a run may be resumed with
# others. P counts by its content, the batch by its effective size.
NON_IDENTITY = (
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


def is_identity(name: str) -> bool:
    """Whether runs with other values of a setting are other games."""
    return not name.startswith(NON_IDENTITY)


def differs_in_result(name: str) -> bool:
    """Whether runs with other values of a setting end in other networks.

    Unlike `is_identity`, the number of steps counts, and the batch as it was given.
    """
    return name.startswith("game.") or is_identity(name)


def get(settings: Settings, name: str) -> Any:
    """The value of a setting by its dotted name."""
    return operator.attrgetter(name)(settings)


def replace(settings: Any, values: Mapping[str, Any]) -> Any:
    """A copy with values by dotted name.

    Raises:
      InputError: there is no such setting, or a value is of another type.
    """
    for name, value in values.items():
        if name not in ROWS:
            refuse_name(name)
        section, _, last = name.rpartition(".")
        own = getattr(settings, section) if section else settings
        changed = dataclasses.replace(own, **{last: _converted(name, value)})
        settings = (
            dataclasses.replace(settings, **{section: changed}) if section else changed
        )
    return settings


def _converted(name: str, value: Any) -> Any:
    """A value in the setting's type: whole numbers may stand for floats."""
    default = ROWS[name].default
    kind = default if isinstance(default, type) else type(default)
    wanted = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        tuple: "a tuple",
    }
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and not isinstance(value, bool):
            return operator.index(value)
        if kind is float and not isinstance(value, bool | str):
            return float(value)
        if kind is tuple and isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(value)
        if kind is str and isinstance(value, str):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    refuse(name, value, wanted[kind])


def fill(settings: Settings, recipe: str, values: Mapping[str, Any]) -> Settings:
    """A copy in which what the recipe decides is filled in, where it is not set.

    Args:
      settings: with None where nothing is set.
      recipe: its name, for the message.
      values: the recipe's, by dotted name.

    Raises:
      InputError: the recipe has no value for a setting.
    """
    missing = [name for name in ROWS if get(settings, name) is None]
    for name in missing:
        if name not in values:
            raise InputError(
                f"recipe={recipe!r}: has no {name}; make it of another recipe by its"
                " `adding`",
                "recipe",
            )
    return replace(settings, {name: values[name] for name in missing})


def refuse(name: str, value: Any, must_be: str) -> NoReturn:
    """Refuses a setting's value: an InputError that names it."""
    raise InputError(f"{name}={value!r}: must be {must_be}", name)


def check(settings: Settings) -> None:
    """Refuses values that cannot work.

    Raises:
      InputError: naming the setting and what it must be.
    """
    game, teacher = settings.game, settings.teacher
    shape = teacher.image_shape
    if len(shape) != 3 or min(shape) < 1:
        refuse("teacher.image_shape", shape, "height, width, channels")
    if not len(teacher.mean) == len(teacher.std) == shape[2] or min(teacher.std) <= 0:
        raise InputError(
            f"teacher.mean={teacher.mean} and teacher.std={teacher.std}: must have"
            f" {shape[2]} values each, one per channel, std above 0",
            "teacher.mean",
            "teacher.std",
        )
    for name, row in ROWS.items():
        value = get(settings, name)
        if not row.rule.holds(value):
            refuse(name, value, row.rule.must_be)
    again, resize = game.reobserve_steps, settings.eval.resize
    rebuilt = settings.reconstruction
    related: list[tuple[str, bool, str]] = [
        (
            "game.warmup_steps",
            game.warmup_steps >= game.observe_steps,
            "observe_steps or more: Q trains on frozen ranges",
        ),
        (
            "game.reobserve_steps",
            0 <= again <= game.warmup_steps - game.observe_steps,
            "0 to warmup_steps - observe_steps",
        ),
        ("game.steps", game.steps >= game.warmup_steps, "warmup_steps up"),
        (
            "game.lambda_l",
            0 <= game.lambda_l <= game.lambda_u <= 1,
            "0 <= lambda_l <= lambda_u <= 1",
        ),
        (
            "reconstruction.images",
            rebuilt.images % rebuilt.batch_size == 0,
            f"a multiple of reconstruction.batch_size={rebuilt.batch_size}",
        ),
        (
            "eval.resize",
            resize == 0 or resize >= max(shape[:2]),
            "0, or at least the images' height and width",
        ),
    ]
    for name, holds, must_be in related:
        if not holds:
            refuse(name, get(settings, name), must_be)


def bits_label(
    weight_bits: int,
    act_bits: int,
    first_last_bits: int = 0,
    places: str = "nonlinearities",
) -> str:
    """What a setting of the bits is called: 'W4A4', or 'W4A4 first/last 8'.

    Where all activations are quantized it is 'W4A4 all activations'.
    """
    ends = f" first/last {first_last_bits}" if first_last_bits else ""
    everywhere = " all activations" if places == "all" else ""
    return f"W{weight_bits}A{act_bits}{ends}{everywhere}"


def dataset_name(dataset: str, data_dir: str) -> str:
    """What an evaluation set is called: its TFDS name, or 'folder NAME'."""
    return f"{dataset} {Path(data_dir).name}" if dataset == FOLDER else dataset


def split_name(dataset: str, data_dir: str, split: str) -> str:
    """What the part of it that is taken is called: 'cifar10 test', 'folder val[:9]'."""
    if dataset == FOLDER:
        return dataset_name(dataset, data_dir) + split[len(split.split("[")[0]) :]
    return f"{dataset} {split}"


def nearest(wanted: str) -> str:
    """The setting whose name is most like `wanted`."""

    # The last part tells most: people forget the section.
    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, name, wanted).ratio()
        ends = (name.split(".")[-1], wanted.split(".")[-1])
        return whole + 2 * difflib.SequenceMatcher(None, *ends).ratio()

    return max(ROWS, key=likeness)


# Settings that there are no more, and why.
REMOVED = {
    "quant.reestimate_steps": "Q keeps P's statistics, which were better than G's",
}


def refuse_name(wanted: str) -> NoReturn:
    """Refuses a setting that there is not, with the nearest that there is."""
    if wanted in REMOVED:
        raise InputError(f"{wanted}: removed; {REMOVED[wanted]}", wanted)
    like = nearest(wanted)
    raise InputError(f"{wanted}: no such setting; the nearest is {like}", wanted, like)
