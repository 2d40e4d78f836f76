"""What a person sees during the game: one progress line, or plain lines in a file."""

import datetime
import sys
from collections.abc import Mapping
from typing import Any

import tqdm

_quiet = _silent = False


def be_quiet() -> None:
    """From now on nothing is shown of a run but warnings and results."""
    global _quiet
    _quiet = True


def be_silent() -> None:
    """From now on nothing is shown at all: another process speaks."""
    global _quiet, _silent
    _quiet = _silent = True


class Progress:
    """A progress bar on a terminal; elsewhere one plain line per update.

    Args:
      total: steps of the whole run.
      begin: steps that were taken before.
    """

    def __init__(self, total: int, begin: int = 0):
        self._total = total
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=total,
            initial=begin,
            unit="step",
            disable=_quiet or not self._interactive,
            smoothing=0.1,
        )

    def update(self, step: int, means: Mapping[str, Any]) -> None:
        """Shows where the game stands, from the means of a logging interval."""
        if "block" in means:
            losses = f"{means['block']}: error {means['error']:.4f}"
        else:
            losses = (
                f"G {means['generator']:.3f}, Q {means['student']:.3f},"
                f" H' {means['h_mean']:.2f}"
            )
        if self._interactive:
            self._bar.set_postfix_str(losses, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        rate = means["steps_per_second"]
        left = datetime.timedelta(seconds=round((self._total - step) / rate))
        mention(f"step {step}/{self._total}: {losses}, {rate:.2f} steps/s, {left} left")

    def show(self, step: int, state: Any, means: Mapping[str, Any]) -> None:
        """`update` as a callback of the loop."""
        del state
        self.update(step, means)

    def close(self) -> None:
        """Leaves the line as it is."""
        self._bar.close()


def mention(message: str) -> None:
    """Says something that is left out when it is to be quiet."""
    if not _quiet:
        say(message)


def say(message: str) -> None:
    """Prints a line above the progress bar."""
    if not _silent:
        tqdm.tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
