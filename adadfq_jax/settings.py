"""Every setting of a run: its default, its meaning, and the values that can work.

Each section is a frozen dataclass of plain typed values. The configuration keys
(`config.keys`) and the specification of a run (`training.spec`) are made from these
classes, so that a setting is written down once. Settings without a default are decided
by the recipe.
"""

import dataclasses
import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from adadfq_jax.errors import InputError

ASSETS = Path(__file__).parent / "assets"
FOLDER = "folder"  # value of eval.dataset for class folders of images, not a TFDS set
ACT_RANGES = ("minmax", "l3")
WEIGHT_RANGES = ("minmax", "mse")
# Values of export.target.
TARGETS = ("onnxruntime", "openvino", "symmetric", "litert")
# The numbers in the losses that may differ between members of a population.
LOSS_SETTINGS = ("lambda_l", "lambda_u", "alpha_ds", "alpha_as")


class Rule(NamedTuple):
    """The values that a setting may have.

    Attributes:
      holds: value -> whether it is allowed.
      must_be: the allowed values in words.
    """

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
_SHARE = _between(0, 1)
_WHOLE_NUMBERS = Rule(
    lambda value: all(isinstance(each, Integral) for each in value), "whole numbers"
)
_ANY = Rule(lambda value: True, "")


class LayerRule(NamedTuple):
    """Bits of the layers whose names a regular expression matches as a whole.

    Attributes:
      pattern: the regular expression.
      weight_bits: bits of the layers' kernels, 0 where the rule gives none.
      act_bits: bits of the layers' operands, 0 where the rule gives none.
    """

    pattern: str
    weight_bits: int
    act_bits: int


def layer_rules(text: str) -> list[LayerRule]:
    """Parse 'PATTERN=wKaK,...'; 'wK' or 'aK' may be left out.

    Raises:
      ValueError: the text has another form.
    """
    found, at = [], 0
    # A pattern ends where '=' and bits follow, so that it may have commas itself.
    item = re.compile(r" *(.+?)=(?=[wa])(?:w([2-8]))?(?:a([2-8]))? *(?:,|$)")
    while at < len(text):
        match = item.match(text, at)
        if not match:
            raise ValueError(text[at:])
        try:
            re.compile(match[1])
        except re.error as error:
            raise ValueError(match[1]) from error
        found.append(LayerRule(match[1], int(match[2] or 0), int(match[3] or 0)))
        at = match.end()
    return found


def _is_layer_rules(text: str) -> bool:
    try:
        layer_rules(text)
    except ValueError:
        return False
    return True


class Budget(NamedTuple):
    """A limit for the choice of bits per layer, see `quant.budget`.

    Attributes:
      kind: 'size', in bytes, or 'bits'.
      amount: the limit.
    """

    kind: str
    amount: float


def parse_budget(text: str) -> Budget:
    """Parse 'size=150kB', 'size=1.5MB' or 'bits=4.0'.

    Raises:
      ValueError: the text has another form.
    """
    match = re.fullmatch(r"(size)=([0-9.]+)(kB|MB)|(bits)=([0-9.]+)", text)
    if not match:
        raise ValueError(text)
    if match[1]:
        return Budget("size", float(match[2]) * {"kB": 1e3, "MB": 1e6}[match[3]])
    return Budget("bits", float(match[5]))


def _is_budget(text: str) -> bool:
    try:
        kind, amount = parse_budget(text) if text else ("bits", 2.0)
    except ValueError:
        return False
    return (2 if kind == "bits" else 1) <= amount < math.inf


_BUDGET = Rule(_is_budget, "'size=150kB', 'size=1.5MB' or 'bits=4.0', 2 at least")
_LAYER_RULES = Rule(
    _is_layer_rules,
    "PATTERN=wKaK,... with bits K from 2 to 8, as in 'output=w8a8,stage1_.*=w4'",
)


def _setting(default: Any, text: str, rule: Rule = _ANY) -> Any:
    return dataclasses.field(default=default, metadata={"text": text, "rule": rule})


def _from_recipe(kind: type, text: str, rule: Rule = _ANY) -> Any:
    metadata = {"text": text, "rule": rule, "type": kind}
    return dataclasses.field(default=None, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """P: its file, its network, and how its images are normalised."""

    path: str = _setting(
        "",
        "P's file: .pth, .pt, .th, .safetensors or .onnx; or hf://OWNER/NAME, with"
        " @REVISION if wanted, a repository of the Hugging Face Hub",
    )
    model: str = _setting(
        "",
        "P's and Q's network; '': recognised from the names in the file. The network of"
        " an ONNX file has any name, '': that of the file",
    )
    batch_norms: bool = _setting(
        True, "whether an ONNX file without batch norms is refused"
    )
    num_classes: int = _setting(
        10,
        "length of the logits; 0: as in P's file",
        Rule(lambda value: value == 0 or value >= 2, "0 or at least 2"),
    )
    image_shape: tuple[int, ...] = _setting(
        (32, 32, 3),
        "height, width, channels; (): those of an ONNX file or a repository, or those"
        " that the network is used with most",
        _WHOLE_NUMBERS,
    )
    key: str = _setting(
        "",
        "keys around P's weights, as state_dict_ema, where the file has several sets;"
        " '': those that are no average of others",
    )
    mean: tuple[float, ...] = _setting(
        (0.0, 0.0, 0.0),
        "mean of each channel, of pixels in [0, 1]; (): a repository's, else ImageNet's"
        " for three channels, else 0.5",
    )
    std: tuple[float, ...] = _setting(
        (1.0, 1.0, 1.0),
        "standard deviation of each channel, of pixels in [0, 1]; (): ImageNet's for"
        " three channels, else 0.25",
    )
    layout: str = _setting(
        "NHWC",
        "layout of the network's images, or 'NCHW'; image_shape is the same with both",
        _one_of("NHWC", "NCHW"),
    )
    expected_top1: float = _setting(
        0.0, "P's expected top-1 in per cent; a warning is given if P is 2 points below"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quant:
    """How Q's kernels and activations are quantized."""

    weight_bits: int = _setting(4, "bits of kernels, 2 to 8", _BITS)
    act_bits: int = _setting(4, "bits of activations, 2 to 8", _BITS)
    first_last_bits: int = _setting(
        0,
        "bits of the first and last layer's kernels and of the last layer's input, 2 to"
        " 8; 0: the same as all others. Results with it are not comparable with others",
        _BITS_OR_0,
    )
    layer_bits: str = _setting(
        "",
        "bits of single layers, as in 'output=w8a8,stage1_.*=w4': regular expressions"
        " that match whole names; the last match decides; see docs/guides/bits",
        _LAYER_RULES,
    )
    budget: str = _setting(
        "",
        "'size=150kB' (of Q's file, or MB) or 'bits=4.0' (of kernels and of operands on"
        " average): bits per layer are chosen at the start; layer_bits still holds",
        _BUDGET,
    )
    range_ema: str = _setting(
        "corrected",
        "how activation ranges are averaged; 'released': as in the released code",
        _one_of("corrected", "released"),
    )
    act_range: str = _from_recipe(
        str,
        "activation range of a batch: 'minmax', or 'l3', of least cubed error",
        _one_of(*ACT_RANGES),
    )
    weight_range: str = _from_recipe(
        str,
        "range of a kernel's channel: 'minmax', or 'mse' with clip ratios chosen on P",
        _one_of(*WEIGHT_RANGES),
    )
    mask_gradient: bool = _from_recipe(
        bool, "whether activations beyond their range get no gradient"
    )
    symmetric: bool = _setting(
        False,
        "whether a kernel's ranges are symmetric, so that its codes are signed integers"
        " with zero point 0",
    )
    places: str = _setting(
        "nonlinearities",
        "where activations are quantized: after nonlinearities, as in the paper; 'all':"
        " also whatever enters a convolution, a product or a sum, images included."
        " Results with 'all' are not comparable with others",
        _one_of("nonlinearities", "all"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Game:
    """The two-player game: schedule, optimizers, and the numbers in its losses."""

    batch_size: int = _from_recipe(
        int, "images in a step, see batch_rule", _at_least(2)
    )
    batch_rule: str = _setting(
        "global",
        "batch_size counts images of all devices; 'per_device': of each device",
        _one_of("global", "per_device"),
    )
    steps: int = _from_recipe(
        int, "steps of the whole game; 0 selects the recipe 'calibrate'"
    )
    observe_steps: int = _from_recipe(
        int,
        "steps in which Q's activation ranges move",
        _at_least(1, ": ranges must be seen"),
    )
    warmup_steps: int = _from_recipe(int, "step from which Q trains, on frozen ranges")
    rate_drops: tuple[int, ...] = _from_recipe(
        tuple, "steps at which both rates drop", _WHOLE_NUMBERS
    )
    rate_drop_factor: float = _setting(0.1, "factor of both rates at each drop")
    generator: str = _setting(
        "embedding",
        "how the label enters G: 'embedding' scales the latents, 'conditional_bn' picks"
        " the scale and bias of G's batch norms",
        _one_of("embedding", "conditional_bn"),
    )
    generator_channels: int = _setting(
        128,
        "channels of G's first maps and first convolution, even; the second has half as"
        " many. 64 make its convolutions four times cheaper",
        Rule(lambda value: value >= 2 and value % 2 == 0, "even, at least 2"),
    )
    g_rate: float = _from_recipe(float, "rate of G's Adam", _NOT_NEGATIVE)
    q_rate: float = _from_recipe(float, "rate of Q's Nesterov SGD", _NOT_NEGATIVE)
    q_weight_decay: float = _setting(1e-4, "weight decay of Q's parameters")
    q_average: float = _from_recipe(
        float,
        "decay of the average of Q's weights, which becomes the result; 0: no average",
        Rule(lambda value: 0 <= value < 1, "0 to below 1"),
    )
    framed_weight: float = _from_recipe(
        float,
        "weight of Q's loss on images in flat black or white frames; 0: no such loss",
        _NOT_NEGATIVE,
    )
    lambda_l: float = _from_recipe(float, "lower boundary of H'", _SHARE)
    lambda_u: float = _from_recipe(float, "upper boundary of H'", _SHARE)
    alpha_ds: float = _from_recipe(float, "weight of the disagreement loss")
    alpha_as: float = _from_recipe(float, "weight of the agreement loss")
    beta: float = _from_recipe(
        float, "weight of the disagreement and agreement losses together"
    )
    gamma: float = _from_recipe(float, "weight of the loss of BN statistics")
    temperature: float = _from_recipe(
        float, "temperature of Q's loss", Rule(lambda value: value > 0, "above 0")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Block-wise reconstruction after the game, on images of the game's G."""

    iterations: int = _from_recipe(
        int, "iterations for each block; 0: no reconstruction", _NOT_NEGATIVE
    )
    images: int = _setting(
        1024, "number of G's images that the blocks learn from", _at_least(1)
    )
    framed: float = _setting(
        0.5,
        "part of these images that is in flat black or white frames",
        _between(0, 1),
    )
    batch_size: int = _setting(
        32, "images in an iteration, over all devices", _at_least(1)
    )
    rate: float = _setting(
        7.5e-3,
        "rate of Adam on the rounding; about 1.5 / iterations works",
        _NOT_NEGATIVE,
    )
    factor_rate: float = _setting(
        3e-3,
        "rate of Adam on the logarithms of scales and ranges; it falls to 0",
        _NOT_NEGATIVE,
    )
    penalty: float = _setting(
        0.01, "weight of the penalty on weights that are not rounded", _NOT_NEGATIVE
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration of Q after the game, on images of the game's G, without training."""

    images: int = _from_recipe(
        int,
        "number of G's images that biases are corrected on; 0: no calibration",
        _NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """The evaluation set and how P and Q are measured on it."""

    enabled: bool = _setting(True, "whether P and Q are measured")
    dataset: str = _setting(
        "",
        "a TFDS name, or 'folder' for images DATA_DIR/CLASS/IMAGE; '': nothing is"
        " measured",
    )
    data_dir: str = _setting(
        "",
        "for 'folder': the folder of images, and with '' nothing is measured; for a"
        " TFDS set: the folder of prepared sets, and '' is TFDS's own",
    )
    split: str = _setting(
        "test",
        "split of a TFDS set, with or without a slice; with 'folder', a slice [A:B]",
    )
    classes: str = _setting(
        "", "file with a folder's classes in P's order; '': sorted names"
    )
    resize: int = _setting(
        0, "shorter side before the centre crop; 0: images have P's size already"
    )
    filter: str = _setting(
        "bilinear",
        "filter of the antialiased resizing, or 'bicubic'",
        _one_of("bilinear", "bicubic"),
    )
    batch_size: int = _setting(50, "images in a batch, over all devices", _at_least(1))
    between: int = _setting(
        2, "number of evaluations of Q between the first and the last", _NOT_NEGATIVE
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
    integer: bool = _setting(
        True,
        "whether quantized.integer.onnx, which runtimes compute in 8-bit integers, is"
        " written beside quantized.onnx",
    )
    layout: str = _setting(
        "NHWC",
        "layout of the images that the ONNX files take, or 'NCHW'",
        _one_of("NHWC", "NCHW"),
    )
    pixels: bool = _setting(
        False, "whether exported files take uint8 pixels and normalise them themselves"
    )
    uint8_only: bool = _setting(
        False,
        "whether quantized.onnx has a byte for each code, for runtimes before opset 21",
    )
    target: str = _setting(
        "onnxruntime",
        "runtime that the files are for: 'openvino' has no 2-bit types;"
        " 'symmetric', for TensorRT: in the integer file activations are INT8 with zero"
        " point 0, as kernels are, and biases float32; 'litert' writes the integer file"
        " as quantized.tflite, too",
        _one_of(*TARGETS),
    )
    float_layers: str = _setting(
        "",
        "names of kernels, joined by commas, whose convolution or product stays in"
        " float32 in the integer file",
    )
    state_dict: str = _setting(
        "",
        "names of the weights in quantized.weights.safetensors, Q's in float32 on their"
        " grids, such as 'torchvision'; '': no such file",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """The log of a run."""

    every: int = _setting(
        50, "largest number of steps between lines of metrics.jsonl", _at_least(1)
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
        200, "steps between checkpoints; 0: only at the end", _NOT_NEGATIVE
    )
    keep: int = _setting(
        3,
        "number of checkpoints that are kept, at least 2",
        _at_least(2, ": one stays while the next is written"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run."""

    recipe: str = _setting(
        "adadfq", "name of the losses and of all defaults that are the recipe's"
    )
    seed: int = _setting(
        0,
        "seed of the initial G and of every draw",
        Rule(lambda value: 0 <= value < 2**32, "0 to 2**32 - 1"),  # as keys take it
    )
    population: str = _setting(
        "",
        "games that run at once, as in 'seed=0,1,2'; see docs/guides/populations",
    )
    members_at_once: int = _setting(
        0,
        "members of a population in one computation on a device; 0: 1 on CPU, all on"
        " other devices",
        _NOT_NEGATIVE,
    )
    devices: int = _setting(
        0, "number of devices that each process uses; 0: all", _NOT_NEGATIVE
    )
    steps_per_dispatch: int = _setting(
        0,
        "steps compiled into one loop; 0: 1 on CPU, 50 on other devices",
        _NOT_NEGATIVE,
    )
    compute_dtype: str = _setting(
        "float32",
        "dtype that G and P compute in, or 'bfloat16'; Q is always float32",
        _one_of("float32", "bfloat16"),
    )
    matmul_precision: str = _setting(
        "highest",
        "precision of products on TPU and GPU, by JAX's names",
        _one_of("default", "high", "highest"),
    )
    teacher: Teacher = Teacher()
    quant: Quant = Quant()
    game: Game = Game()
    reconstruction: Reconstruction = Reconstruction()
    calibration: Calibration = Calibration()
    eval: Eval = Eval()
    export: Export = Export()
    log: Log = Log()
    report: Report = Report()
    checkpoint: Checkpoint = Checkpoint()


class Row(NamedTuple):
    """A setting, as a row of the table of settings.

    Attributes:
      name: dotted name.
      default: the default, or a type where the recipe decides.
      text: its meaning.
      rule: the values that it may have.
    """

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

# Settings that do not change the numbers of a game, so that a run may be resumed with
# other values. P counts by its content and the batch by its effective size.
NON_IDENTITY = (
    "population",
    "members_at_once",
    "devices",
    "steps_per_dispatch",
    "teacher.path",
    "teacher.batch_norms",
    "teacher.key",
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

# Settings that came later. An identity has them where they are not at their defaults,
# so that runs of earlier versions go on.
LATER = ("quant.layer_bits", "quant.budget", "game.generator_channels")


def is_identity(name: str) -> bool:
    """Return whether another value of a setting makes a run another game."""
    return not name.startswith(NON_IDENTITY)


def differs_in_result(name: str) -> bool:
    """Return whether another value of a setting makes a run end in another network.

    Unlike in `is_identity`, the number of steps counts, and so does the batch size as
    it was given.
    """
    return name.startswith("game.") or is_identity(name)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree of sections by dotted name."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            values |= flatten(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def complete(
    values: Mapping[str, Any], names: Iterable[str] = tuple(ROWS)
) -> dict[str, Any]:
    """Give the settings that a run of an earlier version did not have their defaults.

    Args:
      values: the run's values as JSON, by dotted name.
      names: the settings that it may lack. Those that a recipe decides have no default.
    """
    defaults = {name: ROWS[name].default for name in names}
    usual = {k: v for k, v in defaults.items() if not isinstance(v, type)}
    # JSON has a list for a tuple.
    return json.loads(json.dumps(usual)) | dict(values)


def get(settings: Settings, name: str) -> Any:
    """Return the value of a setting by its dotted name."""
    return operator.attrgetter(name)(settings)


def replace(settings: Any, values: Mapping[str, Any]) -> Any:
    """Copy the settings with new values, which are given by dotted name.

    Raises:
      InputError: there is no such setting, or a value has another type.
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
    """Convert a value to the setting's type; whole numbers are taken for floats."""
    default = ROWS[name].default
    kind = default if isinstance(default, type) else type(default)
    wanted = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        tuple: "a tuple of numbers",
    }
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and not isinstance(value, bool):
            return operator.index(value)
        if kind is float and not isinstance(value, bool | str):
            return float(value)
        numbers = isinstance(value, Sequence) and all(
            isinstance(x, Real) for x in value
        )
        if kind is tuple and numbers and not isinstance(value, str):
            return tuple(value)
        if kind is str and isinstance(value, str):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    refuse(name, value, wanted[kind])


def fill(settings: Settings, recipe: str, values: Mapping[str, Any]) -> Settings:
    """Copy the settings and give those that are None the recipe's values.

    Args:
      settings: settings with None where the recipe decides.
      recipe: the recipe's name, for the message.
      values: the recipe's values, by dotted name.

    Raises:
      InputError: the recipe has no value for a setting.
    """
    missing = [name for name in ROWS if get(settings, name) is None]
    for name in missing:
        if name not in values:
            raise InputError(
                f"recipe={recipe!r}: it has no value for {name}; make your recipe from"
                " another one with `adding`, as in recipes.get('adadfq').adding(...)",
                "recipe",
            )
    return replace(settings, {name: values[name] for name in missing})


def refuse(name: str, value: Any, must_be: str) -> NoReturn:
    """Raise an InputError that names a setting, its value and the allowed values."""
    raise InputError(f"{name}={value!r}: must be {must_be}", name)


def check(settings: Settings) -> None:
    """Refuse values that cannot work.

    Raises:
      InputError: a value cannot work; the message names the setting and the allowed
        values.
    """
    game, teacher = settings.game, settings.teacher
    shape = teacher.image_shape
    if shape and (len(shape) != 3 or min(shape) < 1):
        refuse("teacher.image_shape", shape, "height, width, channels")
    mean, std = teacher.mean, teacher.std
    channels = shape[2] if shape else len(std)
    both = bool(mean) == bool(std)
    if not both or (std and (not len(mean) == len(std) == channels or min(std) <= 0)):
        raise InputError(
            f"teacher.mean={teacher.mean} and teacher.std={teacher.std}: must have"
            f" {channels} values each, one per channel, std above 0",
            "teacher.mean",
            "teacher.std",
        )
    _check_pixels(teacher.mean, teacher.std)
    _check_rules(settings, ROWS)
    check_target(settings.export)
    resize, rebuilt = settings.eval.resize, settings.reconstruction
    related: list[tuple[str, bool, str]] = [
        (
            "game.warmup_steps",
            game.warmup_steps >= game.observe_steps,
            f"at least game.observe_steps={game.observe_steps}: Q trains on frozen"
            " ranges",
        ),
        (
            "game.steps",
            game.steps >= game.warmup_steps,
            f"at least game.warmup_steps={game.warmup_steps}, from where Q trains;"
            " for a shorter game give game.observe_steps and game.warmup_steps as well",
        ),
        (
            "game.lambda_l",
            game.lambda_l <= game.lambda_u,
            f"at most game.lambda_u={game.lambda_u}",
        ),
        (
            "calibration.images",
            not (settings.calibration.images and rebuilt.iterations),
            "0 where reconstruction.iterations is not",
        ),
        (
            "game.warmup_steps",
            not settings.calibration.images or game.warmup_steps == game.steps,
            f"game.steps={game.steps}, since a calibration does not train Q",
        ),
        (
            "reconstruction.images",
            rebuilt.images % rebuilt.batch_size == 0,
            f"a multiple of reconstruction.batch_size={rebuilt.batch_size}",
        ),
        (
            "eval.resize",
            resize == 0 or resize >= max(shape[:2], default=0),
            "0, or at least the images' height and width",
        ),
    ]
    for name, holds, must_be in related:
        if not holds:
            refuse(name, get(settings, name), must_be)


def check_target(export: Export) -> None:
    """Refuse LiteRT's file without the integer file, which it is made from.

    Raises:
      InputError: that file is not wanted.
    """
    if export.target == "litert" and not (export.onnx and export.integer):
        refuse(
            "export.target",
            export.target,
            "another one where export.onnx or export.integer is False, since the file"
            " for LiteRT is made from the integer file",
        )


def _check_rules(settings: Settings, names: Iterable[str]) -> None:
    for name in names:
        rule, value = ROWS[name].rule, get(settings, name)
        if not rule.holds(value):
            refuse(name, value, rule.must_be)


def section(name: str, values: Mapping[str, Any]) -> Any:
    """Return a section of the settings with these values, and the other defaults.

    Args:
      name: of the section, as 'export'.
      values: by name in the section.

    Raises:
      InputError: there is no such setting, or a value is not valid.
    """
    named = {f"{name}.{last}": value for last, value in values.items()}
    settings = replace(Settings(), named)
    _check_rules(settings, named)
    return getattr(settings, name)


def _check_pixels(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse a mean and a standard deviation that are not of pixels in [0, 1].

    Raises:
      InputError: the message has the values divided by 255, where they are of bytes.
    """
    if all(0 <= value <= 1 for value in mean) and all(value <= 1 for value in std):
        return
    advice = ""
    if all(0 <= value <= 255 for value in (*mean, *std)):
        of_bytes = any(value > 1 for value in mean)
        divided = [
            tuple(float(f"{value / 255:.4g}") for value in values)
            if of_bytes or values is std
            else tuple(values)
            for values in (mean, std)
        ]
        advice = (
            "; these are of pixels up to 255, in [0, 1] they are"
            f" teacher.mean={divided[0]} and teacher.std={divided[1]}"
        )
    raise InputError(
        f"teacher.mean={tuple(mean)} and teacher.std={tuple(std)}: must be of pixels in"
        f" [0, 1], the mean not negative and both at most 1{advice}",
        "teacher.mean",
        "teacher.std",
    )


def bits_label(
    weight_bits: int,
    act_bits: int,
    first_last_bits: int = 0,
    places: str = "nonlinearities",
    *mixed: Any,
) -> str:
    """Return the name for numbers of bits: 'W4A4', or 'W4A4 first/last 8'.

    Where all activations are quantized, the name is 'W4A4 all activations'. It is
    'W4A4 mixed' where a value of `mixed` says that layers have bits of their own.
    """
    ends = f" first/last {first_last_bits}" if first_last_bits else ""
    everywhere = " all activations" if places == "all" else ""
    each = " mixed" if any(mixed) else ""
    return f"W{weight_bits}A{act_bits}{ends}{each}{everywhere}"


def bits_of(quant: Quant) -> str:
    """Return the name for the bits that settings ask for, see `bits_label`."""
    return bits_label(
        *(quant.weight_bits, quant.act_bits, quant.first_last_bits, quant.places),
        *(quant.layer_bits, quant.budget),
    )


def dataset_name(dataset: str, data_dir: str) -> str:
    """Return the name of an evaluation set: its TFDS name, or 'folder NAME'."""
    return f"{dataset} {Path(data_dir).name}" if dataset == FOLDER else dataset


def split_name(dataset: str, data_dir: str, split: str) -> str:
    """Return the name of an evaluation split: 'cifar10 test', 'folder val[:9]'."""
    if dataset == FOLDER:
        return dataset_name(dataset, data_dir) + split[len(split.split("[")[0]) :]
    return f"{dataset} {split}"


def nearest(wanted: str) -> str:
    """Return the setting whose name is most like `wanted`, or '' if none is."""

    # The last part counts most, since people forget the section.
    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, name, wanted).ratio()
        ends = (name.split(".")[-1], wanted.split(".")[-1])
        return whole + 2 * difflib.SequenceMatcher(None, *ends).ratio()

    best = max(ROWS, key=likeness)
    return best if likeness(best) > 1.8 else ""


_LAST = "the last version with it is 0.1.0"

# Settings that were removed, and why.
REMOVED = {
    "quant.reestimate_steps": f"Q keeps P's statistics, which were better; {_LAST}",
    "quant.learn_ranges": f"it brought nothing; {_LAST}",
    "game.reobserve_steps": f"it brought nothing; {_LAST}",
    "game.q_decay_norms": f"weight decay acts on every parameter; {_LAST}",
}


def refuse_name(wanted: str) -> NoReturn:
    """Raise an InputError for an unknown setting, which names the nearest one."""
    if wanted in REMOVED:
        raise InputError(f"{wanted}: removed; {REMOVED[wanted]}", wanted)
    like = nearest(wanted)
    hint = f"; the nearest is {like}" if like else ""
    raise InputError(f"{wanted}: no such setting{hint}", wanted, like)
