"""Which values of a configuration can work."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from adadfq_jax.config import (
    ACT_RANGES,
    BATCH_RULES,
    COMPUTE_DTYPES,
    FILTERS,
    GENERATORS,
    KEYS,
    LAYOUTS,
    PRECISIONS,
    RANGE_EMAS,
    WEIGHT_RANGES,
    refuse_key,
)
from adadfq_jax.errors import InputError


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
            refuse_key(key)
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
            "quant.first_last_bits",
            quant.first_last_bits,
            quant.first_last_bits == 0 or 2 <= quant.first_last_bits <= 8,
            "0 or 2 to 8",
        ),
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
        (
            "game.framed_weight",
            game.framed_weight,
            0 <= game.framed_weight < math.inf,
            "0 or more",
        ),
        ("teacher.num_classes", p.num_classes, p.num_classes >= 2, "at least 2"),
        ("devices", config.devices, config.devices >= 0, "0 or more"),
        (
            "members_at_once",
            config.members_at_once,
            config.members_at_once >= 0,
            "0 or more",
        ),
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
            "game.generator",
            game.generator,
            game.generator in GENERATORS,
            " or ".join(GENERATORS),
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
        ("eval.filter", e.filter, e.filter in FILTERS, " or ".join(FILTERS)),
        (
            "eval.resize",
            e.resize,
            e.resize == 0 or e.resize >= max(shape[:2]),
            "0, or at least the images' height and width",
        ),
        (
            "export.layout",
            config.export.layout,
            config.export.layout in LAYOUTS,
            " or ".join(LAYOUTS),
        ),
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
