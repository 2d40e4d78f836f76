r"""Command line of the main job.

    python -m adadfq_jax.main --config=configs/fashion_mnist_resnet20.py:w4a4 \
        --workdir=DIR

Any configuration key can be overridden: `--config.game.lambda_l=0.2`; --keys lists
them. Exit codes: 0 done, 2 for input that cannot be used.
"""

import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

import adadfq_jax
from adadfq_jax import config
from adadfq_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with its argument after a colon."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the results.")
_KEYS = flags.DEFINE_bool("keys", False, "List every configuration key and stop.")
_VERSION = flags.DEFINE_bool("version", False, "Print the version and stop.")

EXIT_BAD_INPUT = 2


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but that anything wrong is one line and exit code 2."""
    try:
        config.refuse_unknown_keys(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise InputError(f"{rest[1]!r}: flags start with --, as in --config=FILE")
        return rest
    except (flags.Error, OSError) as error:
        # A config file that fails comes as a traceback, whose last line says why.
        reason = str(error).strip().splitlines()[-1]
        _refuse(reason.removeprefix(f"{InputError.__module__}.InputError: "))
    except InputError as error:
        _refuse(error)


def _refuse(reason: object) -> NoReturn:
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def main(argv: list[str]) -> None:
    """Runs the main job."""
    del argv
    if _VERSION.value:
        print(f"adadfq_jax {adadfq_jax.__version__}")
        return
    if _KEYS.value:
        print(config.reference())
        return
    # JAX and TFDS tell of every backend and reader that they did not find.
    logging.set_verbosity(logging.ERROR)
    from adadfq_jax import train  # here, so that --help does not wait

    try:
        if _CONFIG.value is None or _WORKDIR.value is None:
            raise InputError("both --config and --workdir are needed; see README.md")
        train.run(_CONFIG.value, Path(_WORKDIR.value))
    except (InputError, OSError) as error:
        _refuse(error)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
