"""TensorBoard event files, written where `log.tensorboard` is set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adadfq_jax.runtime import extras

FOLDER = "tensorboard"


def need_writer() -> Any:
    """Import the class that writes event files.

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
    """A log of numbers by step, for TensorBoard; without a folder it does nothing.

    Args:
      folder: folder of the event files, or None.
      begin: the step from which the run resumes; TensorBoard hides the later entries
        of earlier files.
    """

    def __init__(self, folder: Path | None, begin: int = 0):
        self._writer = (
            need_writer()(str(folder), purge_step=begin + 1) if folder else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, by name."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
