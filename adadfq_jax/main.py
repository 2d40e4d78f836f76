r"""Command line of the main job.

    python -m adadfq_jax.main --config=configs/fashion_mnist_resnet20.py:w4a4 \
        --workdir=DIR

Any configuration key can be overridden: `--config.game.lambda_l=0.2`.
"""

import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from adadfq_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with its argument after a colon."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the results.")

EXIT_BAD_INPUT = 2


def _parse_flags(argv: list[str]) -> list[str]:
    """Absl's parser, but that a bad configuration is one line and no traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (InputError, AttributeError, KeyError, FileNotFoundError) as error:
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def main(argv: list[str]) -> None:
    """Runs the main job; exit code 2 for what the user can mend."""
    del argv
    from adadfq_jax import train  # after the flags, so that --help does not wait

    try:
        if _CONFIG.value is None or _WORKDIR.value is None:
            raise InputError("both --config and --workdir are needed; see README.md")
        train.run(_CONFIG.value, Path(_WORKDIR.value))
    except InputError as error:
        _refuse(error)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
