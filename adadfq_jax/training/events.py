"""TensorBoard event files, for those who ask for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adadfq_jax.runtime import extras

FOLDER = "tensorboard"


def need_writer() -> Any:
    """The class that writes event files.

    Raises:
      InputError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise extras.missing(
            "log.tensorboard=True", "tensorboardX", "tensorboard"
        ) from error
    return SummaryWriter


class Events:
    """Numbers by step, for TensorBoard; does nothing where there is no folder.

    Args:
      folder: of the event files, or None.
      begin: what earlier files have beyond this step, of a game that was cut short,
        is hidden.
    """

    def __init__(self, folder: Path | None, begin: int = 0):
        self._writer = (
            need_writer()(str(folder), purge_step=begin + 1) if folder else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()
