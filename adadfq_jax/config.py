"""Every configuration key with its default, for the files in configs/ to start from.

This module holds data: it imports neither JAX nor the rest of the package.
"""

import re
from pathlib import Path

import ml_collections

from adadfq_jax.errors import InputError

ASSETS = Path(__file__).parent / "assets"
STEPS_PER_EPOCH = 200  # of the released configurations


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


def default_config() -> ml_collections.ConfigDict:
    """All keys, with the released CIFAR values where there are any."""
    epoch = STEPS_PER_EPOCH
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "matmul_precision": "highest",  # or fake quantization is not exact on TPU
            "teacher": {  # P, and the space in which its images live
                "path": "",
                "model": "resnet20",
                "num_classes": 10,
                "image_shape": (32, 32, 3),  # H, W, channels
                "mean": (0.0, 0.0, 0.0),  # of pixels in [0, 1], per channel
                "std": (1.0, 1.0, 1.0),
                "expected_top1": 0.0,  # per cent; a warning if P is far below
            },
            "quant": {
                "weight_bits": 4,
                "act_bits": 4,
                "range_ema": "corrected",  # or 'released'
            },
            "game": {
                "batch_size": 16,  # global, over all devices
                "steps": 400 * epoch,
                "observe_steps": 4 * epoch,  # Q's activation ranges move
                "warmup_steps": 4 * epoch,  # Q trains from this step on
                "rate_drops": (100 * epoch, 200 * epoch, 300 * epoch),
                "rate_drop_factor": 0.1,  # of both rates, at each drop
                "g_rate": 1e-3,
                "q_rate": 1e-4,
                "q_weight_decay": 1e-4,
                "lambda_l": 0.1,  # boundaries of H'
                "lambda_u": 0.8,
                "alpha_ds": 0.2,  # weight of the disagreement loss
                "alpha_as": 0.1,  # weight of the agreement loss
                "beta": 1.0,  # weight of both together
                "gamma": 1.0,  # weight of the BN statistics
                "temperature": 20.0,  # of Q's loss
            },
            "eval": {
                "enabled": True,
                "dataset": "",  # a TFDS name
                "data_dir": "",  # where it is prepared; '' is TFDS's own folder
                "split": "test",
                "batch_size": 500,
                "between": 2,  # evaluations of Q between the first and the last
            },
            "log": {"every": 50},  # steps between lines of metrics.jsonl
        }
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses values that cannot work.

    Raises:
      InputError: naming the key and what it must be.
    """
    quant, game, p = config.quant, config.game, config.teacher
    height, width, channels = p.image_shape
    rules = {
        f"quant.weight_bits={quant.weight_bits}: must be 2 to 8": (
            2 <= quant.weight_bits <= 8
        ),
        f"quant.act_bits={quant.act_bits}: must be 2 to 8": 2 <= quant.act_bits <= 8,
        f"quant.range_ema={quant.range_ema!r}: must be 'corrected' or 'released'": (
            quant.range_ema in ("corrected", "released")
        ),
        f"game.observe_steps={game.observe_steps}: must be at least 1": (
            game.observe_steps >= 1
        ),
        f"game.warmup_steps={game.warmup_steps}: must be observe_steps or more, since"
        " Q trains on frozen ranges": game.warmup_steps >= game.observe_steps,
        f"game.steps={game.steps}: must be warmup_steps or more": (
            game.steps >= game.warmup_steps
        ),
        f"game.batch_size={game.batch_size}: must be at least 2": game.batch_size >= 2,
        f"teacher.image_shape={tuple(p.image_shape)}: height and width must be"
        " multiples of 4": height % 4 == 0 and width % 4 == 0,
        f"teacher.mean and std must have {channels} values, one per channel": (
            len(p.mean) == len(p.std) == channels
        ),
    }
    for message, holds in rules.items():
        if not holds:
            raise InputError(f"config.{message}")
